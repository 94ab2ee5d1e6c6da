"""A model whose layers are read from its safetensors files one at a time, to score models larger than memory."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.errors import InputError
from layerpeel.model.architecture import find_architecture
from layerpeel.model.checkpoint import check_weights
from layerpeel.model.devices import pick_device, wanted_dtype
from layerpeel.model.loading import check_vocabulary, load_config_of, load_tokenizer

M_MMAP_THRESHOLD = -3  # parameter of glibc's mallopt: larger blocks are mapped, and unmapped when freed


class StreamedLayers:
    """Reads each layer's weights from safetensors files before it runs, and drops them afterwards.

    The next layer is read while one runs, so at most two are in memory.

    Attributes:
        model: loaded but for its layers, whose weights are on the meta device between runs.
    """

    def __init__(self, model: PreTrainedModel, files: Mapping[str, Path], path: str | Path) -> None:
        """Checks that the files have every tensor of every layer.

        Args:
            model: with its layers on the meta device.
            files: the file of each tensor in the checkpoint, by the tensor's name.
            path: the checkpoint, for messages.

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
    def weights_loaded(self, position: int) -> Iterator[None]:
        """Loads the weights of the layer at `position` while the context lasts."""
        layer = self._architecture.layers[position]
        ready = self._read_ahead.pop(position, None) or self._reader.submit(self._read, position)
        self._read_ahead.clear()
        layer.load_state_dict(ready.result(), strict=False, assign=True)
        if position + 1 < len(self._architecture.layers):
            self._read_ahead[position + 1] = self._reader.submit(self._read, position + 1)
        try:
            yield
        finally:
            meta = {name: value.to("meta") for name, value in layer.state_dict().items()}
            layer.load_state_dict(meta, strict=False, assign=True)

    def _names(self, position: int) -> dict[str, str]:
        """The names of the layer's tensors, in its state dict and in the checkpoint."""
        prefix = f"{self._architecture.layer_prefix()}.{position}."
        return {name: prefix + name for name in self._architecture.layers[position].state_dict()}

    def _read(self, position: int) -> dict[str, Tensor]:
        names = self._names(position)
        tensors = _read_tensors(
            {stored: self._files[stored] for stored in names.values()}, self.model.device, self.model.dtype
        )
        return {name: tensors[stored] for name, stored in names.items()}


def load_streamed(
    path: str | Path, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> tuple[StreamedLayers, PreTrainedTokenizerBase]:
    """Loads a causal language model but for its layers, which are read as they run.

    Args, errors: as `load_model`.
    """
    config = load_config_of(path, trust_remote_code=trust_remote_code)
    _return_freed_memory()
    target, wanted = pick_device(device), wanted_dtype(config, pick_device(device), dtype)
    check_weights(config, path)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code)
    files = _tensor_files(path)
    layers = f"{find_architecture(model).layer_prefix()}."
    outside = {n for n, _ in model.named_parameters(remove_duplicate=False) if not n.startswith(layers)}
    tensors = _read_tensors({name: files[name] for name in outside if name in files}, target, wanted)
    for name, tensor in tensors.items():
        set_module_tensor_to_device(model, name, target, value=tensor)
    missing = outside - set(tensors)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)  # removes tied weights from `missing`
    if missing:
        raise InputError(
            f"{path}: the checkpoint lacks weights of its model: {', '.join(sorted(missing)[:3])}",
            hint="the model would run on random values; fetch a complete checkpoint",
        )
    for name, buffer in model.named_buffers():
        set_module_tensor_to_device(model, name, target, value=buffer)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    check_vocabulary(model, tokenizer, path)
    return StreamedLayers(model.eval().requires_grad_(False), files, path), tokenizer


def _return_freed_memory() -> None:
    """Makes glibc return freed blocks of over 1 MB to the system at once.

    By default it keeps blocks of up to 32 MB for reuse, and those of successive layers would accumulate.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def _tensor_files(path: str | Path) -> dict[str, Path]:
    """The file of each tensor in a checkpoint, by the tensor's name.

    Raises:
        InputError: the checkpoint has no safetensors files.
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


def _read_tensors(files: Mapping[str, Path], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Reads tensors, by name, from their safetensors files; floating-point ones are cast to `dtype`."""
    tensors = {}
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as file:
            for name in (name for name, holder in files.items() if holder == path):
                value = file.get_tensor(name)
                # A copy, so that the file can be unmapped.
                tensors[name] = value.to(device, dtype if value.is_floating_point() else None, copy=True)
    return tensors
