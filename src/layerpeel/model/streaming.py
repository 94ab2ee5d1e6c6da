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
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.errors import InputError
from layerpeel.model.architecture import find_architecture
from layerpeel.model.checkpoint_keys import quantised_with
from layerpeel.model.devices import pick_device, wanted_dtype
from layerpeel.model.forward_switches import runnable_config
from layerpeel.model.loading import load_config_of, load_tokenizer, load_without_bytes
from layerpeel.model.origin import local_folder
from layerpeel.model.tensor_files import stored_tensors
from layerpeel.model.vocabulary import check_vocabulary

M_MMAP_THRESHOLD = -3  # parameter of glibc's mallopt: larger blocks are mapped, and unmapped when freed


class StreamedLayers:
    """Reads each layer's weights from safetensors files before it runs, and drops them afterwards.

    The next layer is read while one runs, so at most two are in memory.

    Attributes:
        model: loaded but for its layers, whose weights are on the meta device between runs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        files: Mapping[str, Path],
        dtypes: Mapping[str, torch.dtype],
        path: str | Path,
    ) -> None:
        """Checks that the files have every tensor of every layer.

        Args:
            model: with its layers on the meta device.
            files: the file of each tensor in the checkpoint, by the tensor's name.
            dtypes: to load tensors in, by name.
            path: the checkpoint, for messages.

        Raises:
            InputError: the checkpoint stores layers under other names than the model has.
        """
        self.model, self._files, self._dtypes = model, files, dtypes
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
            {stored: self._files[stored] for stored in names.values()}, self.model.device, self._dtypes
        )
        return {name: tensors[stored] for name, stored in names.items()}


def load_streamed(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> tuple[StreamedLayers, PreTrainedTokenizerBase]:
    """Loads a causal language model but for its layers, which are read as they run.

    What is read, and what is refused, is the same as with `load_model`.

    Args, errors: as `load_model`.
    """
    config = load_config_of(path, trust_remote_code=trust_remote_code, revision=revision)
    _check_not_quantised(config, path)
    _return_freed_memory()
    target, wanted = pick_device(device), wanted_dtype(config, pick_device(device), dtype)
    folder = local_folder(path, revision)
    outline = load_without_bytes(folder, config, path, dtype=wanted, trust_remote_code=trust_remote_code)
    dtypes = {name: tensor.dtype for name, tensor in outline.state_dict().items()}
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            runnable_config(config, announce=True), dtype=wanted, trust_remote_code=trust_remote_code
        )
    files = {name: tensor.file for name, tensor in stored_tensors(folder).items()}
    layers = f"{find_architecture(model).layer_prefix()}."
    outside = {n for n, _ in model.named_parameters(remove_duplicate=False) if not n.startswith(layers)}
    tensors = _read_tensors({name: files[name] for name in outside if name in files}, target, dtypes)
    for name, tensor in tensors.items():
        set_module_tensor_to_device(model, name, target, value=tensor)
    missing = outside - set(tensors)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)  # removes tied weights from `missing`
    if missing:
        raise InputError(
            f"{path}: its parts cannot be read on their own: the files have no tensor {min(missing)}",
            hint="use score.weights: memory",
        )
    for name, buffer in model.named_buffers():
        set_module_tensor_to_device(model, name, target, value=buffer)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code, revision=revision)
    check_vocabulary(model, tokenizer, path)
    return StreamedLayers(model.eval().requires_grad_(False), files, dtypes, path), tokenizer


def _check_not_quantised(config: PretrainedConfig, path: str | Path) -> None:
    method = quantised_with(config)
    if method:
        raise InputError(
            f"{path}: the weights are quantised ({method}), and layers that are read one at a time stay as they are",
            hint="use score.weights: memory, which undoes it where transformers can",
        )


def _return_freed_memory() -> None:
    """Makes glibc return freed blocks of over 1 MB to the system at once.

    By default it keeps blocks of up to 32 MB for reuse, and those of successive layers would accumulate.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


def _read_tensors(
    files: Mapping[str, Path], device: torch.device, dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    """Reads tensors, by name, from their safetensors files, in the dtypes given."""
    tensors = {}
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as file:
            for name in (name for name, holder in files.items() if holder == path):
                value = file.get_tensor(name)
                # A copy, so that the file can be unmapped.
                tensors[name] = value.to(device, dtypes.get(name), copy=True)
    return tensors
