"""Loading and saving teacher, student and tokenizer: safetensors only, nothing executed unless asked."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from layerpeel.architecture import find_architecture
from layerpeel.errors import InputError, RunError
from layerpeel.expressible import first_difference
from layerpeel.files import replace_folder
from layerpeel.progress import RANK

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str = "auto") -> torch.device:
    """The device to run on: CUDA, then MPS, then CPU, unless one is named."""
    if device != "auto":
        try:
            return torch.device(device)
        except RuntimeError:
            raise InputError(f"device: unknown device {device!r}", hint="use auto, cpu, cuda or cuda:N") from None
    if torch.cuda.is_available():  # each process that a launcher started has a GPU of its own
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_config_of(path: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a causal language model, before its weights are read.

    Raises:
        InputError: there is no such model, or it is no causal language model.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(
            f"{path} is not a model folder: it has no config.json",
            hint="give a folder that save_pretrained wrote, or a hub name",
        )
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"no such model: {path} is neither a folder here nor a model that can be loaded from the hub ({reason})",
            hint="check the path; for a hub model, check its name, the network and your access to it",
        ) from None
    _check_causal(config, path)
    return config


def load_model(
    path: str | Path, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model and its tokenizer, checked against each other.

    Args:
        path: a folder or a hub name.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: float32 on a CPU, else that of the checkpoint.
        trust_remote_code: whether code that comes with the checkpoint may run.

    Raises:
        InputError: no such model, no causal language model, weights missing or not in safetensors, or a tokenizer
            with more entries than the model's vocabulary.
    """
    config = load_config_of(path, trust_remote_code=trust_remote_code)
    target = pick_device(device)
    wanted = wanted_dtype(config, target, dtype)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=wanted, use_safetensors=True, trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )  # fmt: skip
    except OSError as error:
        raise InputError(
            f"{path}: the weights cannot be loaded ({str(error).splitlines()[0]})",
            hint="only safetensors are read; convert other formats with save_pretrained",
        ) from None
    if info["missing_keys"]:
        raise InputError(
            f"{path}: the checkpoint lacks weights of its model: {', '.join(sorted(info['missing_keys'])[:3])}",
            hint="the model would run on random values; fetch a complete checkpoint",
        )
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    check_vocabulary(model, tokenizer, path)
    return model.to(target).eval(), tokenizer


class LayerFiles:
    """The layers of a model that stay in its safetensors files: each is read when it runs, and dropped afterwards.

    While one runs the next is read, so that no more than two are ever in memory.

    Attributes:
        model: with all but its layers loaded.
    """

    def __init__(self, model: PreTrainedModel, files: Mapping[str, Path], path: str | Path) -> None:
        """Checks that each layer can be read on its own.

        Args:
            model: its layers without weights (on the meta device).
            files: for each tensor of the checkpoint, the file that holds it.
            path: of the checkpoint, for messages.

        Raises:
            InputError: the checkpoint stores layers under other names than the model has.
        """
        self.model, self._files = model, files
        self._architecture = find_architecture(model)
        for position in range(len(self._architecture.layers)):
            absent = [name for name in self._names(position).values() if name not in files]
            if absent:
                raise InputError(
                    f"{path}: layer {position} cannot be read on its own: the files have no tensor {absent[0]}",
                    hint="use score.weights: memory",
                )
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._read_ahead: dict[int, Future[dict[str, Tensor]]] = {}

    @contextmanager
    def resident(self, position: int) -> Iterator[None]:
        """Lets the layer at a position have its weights for the time of the context."""
        layer = self._architecture.layers[position]
        ready = self._read_ahead.pop(position, None) or self._reader.submit(self._read, position)
        self._read_ahead.clear()
        layer.load_state_dict(ready.result(), strict=False, assign=True)
        if position + 1 < len(self._architecture.layers):
            self._read_ahead[position + 1] = self._reader.submit(self._read, position + 1)
        try:
            yield
        finally:
            meta = {name: p.to("meta") for name, p in layer.named_parameters()}
            layer.load_state_dict(meta, strict=False, assign=True)

    def _names(self, position: int) -> dict[str, str]:
        """The layer's parameters, and what the checkpoint calls them."""
        prefix = f"{self._architecture.layer_prefix()}.{position}."
        return {name: prefix + name for name, _ in self._architecture.layers[position].named_parameters()}

    def _read(self, position: int) -> dict[str, Tensor]:
        names = self._names(position)
        tensors = read_tensors(
            {full: self._files[full] for full in names.values()}, self.model.device, self.model.dtype
        )
        return {name: tensors[full] for name, full in names.items()}


def load_streamed(
    path: str | Path, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[LayerFiles, PreTrainedTokenizerBase]:
    """Loads a causal language model but for its layers, which are read one at a time as they run.

    Args, errors: as `load_model`.
    """
    config = load_config_of(path, trust_remote_code=trust_remote_code)
    target, wanted = pick_device(device), wanted_dtype(config, pick_device(device), dtype)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
    files = _tensor_files(path)
    layers = f"{find_architecture(model).layer_prefix()}."
    outside = [name for name, _ in model.named_parameters() if not name.startswith(layers)]
    tensors = read_tensors({name: files[name] for name in outside if name in files}, target, wanted)
    for name, tensor in tensors.items():
        set_module_tensor_to_device(model, name, target, value=tensor)
    model.tie_weights()
    missing = [n for n, p in model.named_parameters() if p.device.type == "meta" and not n.startswith(layers)]
    if missing:
        raise InputError(
            f"{path}: the checkpoint lacks weights of its model: {', '.join(sorted(missing)[:3])}",
            hint="the model would run on random values; fetch a complete checkpoint",
        )
    for name, buffer in model.named_buffers():
        set_module_tensor_to_device(model, name, target, value=buffer)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    check_vocabulary(model, tokenizer, path)
    return LayerFiles(model.eval().requires_grad_(False), files, path), tokenizer


def read_tensors(files: Mapping[str, Path], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors by name from the safetensors files that hold them; floating-point ones in `dtype`."""
    tensors = {}
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as file:
            for name in (name for name, holder in files.items() if holder == path):
                value = file.get_tensor(name)
                # A copy, so that the mapped file can be let go of.
                tensors[name] = value.to(device, dtype if value.is_floating_point() else None, copy=True)
    return tensors


def _tensor_files(path: str | Path) -> dict[str, Path]:
    """For each tensor of a checkpoint, the file that holds it.

    Raises:
        InputError: there are no safetensors.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(path), allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
    files = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            files.update(dict.fromkeys(opened.keys(), file))
    if not files:
        raise InputError(f"{path}: there are no safetensors files", hint="convert other formats with save_pretrained")
    return files


def wanted_dtype(config: PretrainedConfig, device: torch.device, dtype: str) -> torch.dtype:
    """That of the frozen weights: the one named, or by `auto` float32 on a CPU, else the checkpoint's."""
    return DTYPES.get(dtype) or (torch.float32 if device.type == "cpu" else config.dtype or torch.float32)


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder or the hub.

    Raises:
        InputError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{path}: no tokenizer can be loaded ({reason})", hint="save the tokenizer beside the model"
        ) from None


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Checks that every token has an embedding (a larger embedding is padding, and fine).

    Raises:
        InputError: the tokenizer's ids go beyond the model's vocabulary.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise InputError(
            f"{path}: tokenizer and model have different vocabularies: the tokenizer's ids go up to {largest}, "
            f"the model embeds {rows} tokens (0 to {rows - 1})",
            hint="use the tokenizer that the model was trained with",
        )


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype that a checkpoint is stored in, by its config (float32 if it does not say)."""
    return load_config_of(path).dtype or torch.float32


def fingerprint(path: str | Path, dtype: torch.dtype) -> str:
    """Says which weights a path holds, without reading them: names, sizes and times of its files, and the dtype."""
    folder = Path(path)
    files = sorted(folder.glob("*")) if folder.is_dir() else []
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((str(path), stats, dtype)).encode()).hexdigest()


def count_parameters(model: PreTrainedModel) -> int:
    """Parameters of the model; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """Writes a Hugging Face checkpoint in `dtype`, whole or not at all.

    An older checkpoint at `folder` is replaced once the new one is complete, and was loaded back and compared. Of
    several processes the first writes.

    Raises:
        RunError: what was written is not the model in memory.
    """
    if RANK:
        return
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    state: dict[str, Any] = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in model.state_dict().items()
    }
    running = model.config.dtype
    model.config.dtype = dtype
    try:
        model.save_pretrained(partial, state_dict=state)
    finally:
        model.config.dtype = running
    tokenizer.save_pretrained(partial)
    del state
    check_saved(model, partial, dtype)
    replace_folder(partial, folder)


def check_saved(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Checks that what plain transformers loads from a folder is the model in memory, rounded to `dtype`.

    Compared are the classes, shapes and plain attributes of all modules, and all parameters and buffers, bit by bit:
    a forward reads nothing else but the config and its input, so equal parts give equal logits. The copy is loaded on
    the CPU in `dtype`, which takes the memory that saving took.

    Raises:
        RunError: they differ, or it cannot be loaded; the message names the folder and the first difference.
    """
    loader = type(model) if getattr(model.config, "auto_map", None) else AutoModelForCausalLM
    try:
        loaded, info = loader.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
        odd = sorted({*info["missing_keys"], *info["unexpected_keys"]})
        difference = f"other tensors ({', '.join(odd[:3])})" if odd else first_difference(loaded, model)
        difference = difference or _first_other_tensor(loaded, model)
    except Exception as error:  # whatever transformers, or the family's code, finds wrong with it
        difference = f"an error ({' '.join(str(error).split())})"
    if difference:
        raise RunError(
            f"{folder}: the checkpoint that was just written loads with {difference}",
            hint="it is kept for inspection and must not be used; protect other layers (score.protect.layers), or "
            "report this with the model's config.json",
        )


def _first_other_tensor(loaded: PreTrainedModel, model: PreTrainedModel) -> str | None:
    theirs = dict([*loaded.named_parameters(), *loaded.named_buffers()])
    for name, ours in [*model.named_parameters(), *model.named_buffers()]:
        other = theirs.get(name)
        if other is None or not torch.equal(ours.detach().to("cpu", other.dtype), other):
            return f"another value of {name}"
    return None


def _check_causal(config: PretrainedConfig, path: str | Path) -> None:
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    named = config.architectures or []
    custom = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if not custom and (known is None or (named and not causal & set(named))):
        raise InputError(
            f"{path} is not a causal language model: it is a {', '.join(named) or config.model_type}",
            hint="layerpeel works on decoders that AutoModelForCausalLM loads, such as Llama or Qwen",
        )
