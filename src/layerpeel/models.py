"""Loading and saving teacher, student and tokenizer: safetensors only, nothing executed unless asked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from layerpeel.architecture import text_config
from layerpeel.config import RunConfig
from layerpeel.errors import InputError, RunError, reason_of
from layerpeel.expressible import first_difference
from layerpeel.files import replace_folder
from layerpeel.progress import RANK

BLOCK, BLOCKS = 2**16, 256  # of a file that is told from another: bytes of each, and how many
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_PER_BYTE = 8  # parameters in a byte of a checkpoint, however it is quantised


def pick_device(device: str = "auto") -> torch.device:
    """The device to run on: CUDA, then MPS, then CPU, unless one is named."""
    if device != "auto":
        try:
            target = torch.device(device)
        except RuntimeError:
            raise InputError(f"device: unknown device {device!r}", hint="use auto, cpu, cuda or cuda:N") from None
        there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
        if (target.index or 0) >= there.get(target.type, 0):
            raise InputError(f"device: there is no {device} here", hint="use auto, cpu, cuda or cuda:N")
        return target
    if torch.cuda.is_available():  # each process that a launcher started has a GPU of its own
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def load_config_of(path: str | Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a causal language model, before its weights are read.

    Raises:
        InputError: there is no such model, or it is no causal language model.
    """
    folder = Path(path)
    if os.path.isdir(path) and not (folder / "config.json").is_file():
        raise InputError(
            f"{path} is not a model folder: it has no config.json",
            hint="give a folder that save_pretrained wrote, or a hub name",
        )
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        if os.path.isdir(path):
            raise InputError(
                f"{folder / 'config.json'}: no config of a model that transformers knows ({reason_of(error)})",
                hint="take it from the model's publisher, or write it anew with save_pretrained; code that comes with "
                "a model runs only with trust_remote_code: true",
            ) from None
        raise InputError(
            f"no such model: {path} is neither a folder here nor a model that can be loaded from the hub "
            f"({reason_of(error)})",
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
    check_weights(config, path)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path), dtype=wanted, use_safetensors=True, trust_remote_code=trust_remote_code,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # whatever transformers, or the family's code, finds wrong with it
        raise InputError(
            f"{path}: the weights cannot be loaded ({reason_of(error)})",
            hint="only safetensors that fit config.json are read; convert other formats with save_pretrained",
        ) from None
    for name, stored, expected in sorted(info["mismatched_keys"]):
        raise InputError(
            f"{path}: the weights do not fit config.json: {name} is of shape {list(stored)}, expected {list(expected)}",
            hint="take config.json and weights from the same checkpoint",
        )
    if info["missing_keys"]:
        raise InputError(
            f"{path}: the checkpoint lacks weights of its model: {', '.join(sorted(info['missing_keys'])[:3])}",
            hint="the model would run on random values; fetch a complete checkpoint",
        )
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    check_vocabulary(model, tokenizer, path)
    model = model.to(target).eval()
    _check_finite(model, path)
    return model, tokenizer


def wanted_dtype(config: PretrainedConfig, device: torch.device, dtype: str) -> torch.dtype:
    """What the frozen weights are held in: `dtype`, or for `auto` float32 on a CPU, else that of the checkpoint."""
    return DTYPES.get(dtype) or (torch.float32 if device.type == "cpu" else config.dtype or torch.float32)


def load_teacher(config: RunConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a config's teacher as the config says; see `load_model`."""
    return load_model(
        config.teacher, device=config.device, dtype=config.dtype, trust_remote_code=config.trust_remote_code
    )


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder or the hub.

    Raises:
        InputError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InputError(
            f"{path}: no tokenizer can be loaded ({reason_of(error)})", hint="save the tokenizer beside the model"
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


def least_parameters(config: PretrainedConfig) -> int:
    """Surely no more than a model has: embeddings, and one square matrix a layer."""
    text = text_config(config)
    sizes = [getattr(text, name, 0) for name in ("vocab_size", "hidden_size", "num_hidden_layers")]
    vocabulary, width, depth = (size if isinstance(size, int) else 0 for size in sizes)
    return width * (vocabulary + depth * width)


def check_weights(config: PretrainedConfig, path: str | Path) -> None:
    """Checks a folder's weights by the headers of its files, before anything is allocated for them.

    Raises:
        InputError: a file is damaged or absent, its index leaves the folder, or config.json asks for a far larger model
            than the files hold.
    """
    folder = Path(path)
    if not folder.is_dir():
        return
    for name in sorted(_indexed_files(folder)):
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(
                f"{folder}: the index of its weights names {name}, and there is no such file in the folder",
                hint="fetch a complete checkpoint",
            )
    size = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                opened.keys()
        except Exception as error:
            raise InputError(
                f"{file}: no safetensors file, or not whole ({reason_of(error)})", hint="fetch it again"
            ) from None
        size += file.stat().st_size
    if size and least_parameters(config) > MOST_PER_BYTE * size:
        raise InputError(
            f"{folder / 'config.json'}: it describes a model of {least_parameters(config):,} parameters or more, and "
            f"the weights have {size:,} bytes",
            hint="take config.json and weights from the same checkpoint",
        )


def _indexed_files(folder: Path) -> set[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return set()
    try:
        return {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{index}: no index of weights ({reason_of(error)})", hint="fetch a complete checkpoint"
        ) from None


@torch.no_grad()
def _check_finite(model: PreTrainedModel, path: str | Path) -> None:
    """Checks that the model's outputs for one token are numbers: weights that are not spoil them all."""
    logits = model(torch.zeros(1, 1, dtype=torch.long, device=model.device)).logits
    if not torch.isfinite(logits).all():
        raise InputError(
            f"{path}: the model's outputs are no numbers: its weights hold NaN or infinity, or overflow {model.dtype}",
            hint="fetch the checkpoint again, or load it in another dtype",
        )


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype that a checkpoint is stored in, by its config (float32 if it does not say)."""
    held, _ = PretrainedConfig.get_config_dict(str(path))  # as it is written: no code of the checkpoint's own runs
    places = [held, held.get("text_config") or {}]
    names = [place.get(key) for place in places for key in ("dtype", "torch_dtype")]
    found = getattr(torch, str(next(filter(None, names), "float32")), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def fingerprint(path: str | Path, dtype: torch.dtype) -> str:
    """Says which weights a path holds, without reading them: names, sizes and times of its files, and the dtype."""
    folder = Path(path)
    files = sorted(folder.glob("*")) if folder.is_dir() else []
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((str(path), stats, dtype)).encode()).hexdigest()


def digests(path: str | Path, *, trust_remote_code: bool = False) -> dict[str, str]:
    """What tells one checkpoint from another: of each file in a folder, a hash of its size and of blocks all over it.

    Training moves nearly every number, so that blocks see what a hash of the whole would, in a moment. Of a hub name,
    the commit that was loaded.
    """
    folder = Path(path)
    if not folder.is_dir():
        config = load_config_of(path, trust_remote_code=trust_remote_code)
        return {"commit": str(getattr(config, "_commit_hash", None))}
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".json", ".model")]
    return {file.name: _digest(file) for file in files}


def _digest(file: Path) -> str:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for start in range(0, size, max(BLOCK, size // BLOCKS)):
            opened.seek(start)
            digest.update(opened.read(BLOCK))
    return digest.hexdigest()[:16]


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
