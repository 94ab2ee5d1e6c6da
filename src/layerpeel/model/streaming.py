"""A model whose layers are read from its safetensors files one at a time, for models larger than memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.errors import InputError
from layerpeel.model.architecture import find_architecture
from layerpeel.model.checkpoint_keys import quantised_with
from layerpeel.model.devices import pick_device, wanted_dtype
from layerpeel.model.forward_switches import check_attention, kernel_of, runnable_config
from layerpeel.model.loading import load_config_of, load_tokenizer, load_without_bytes
from layerpeel.model.origin import local_folder
from layerpeel.model.tensor_files import stored_tensors
from layerpeel.model.vocabulary import check_vocabulary
from layerpeel.processes.malloc import give_back_large_blocks

CPU = torch.device("cpu")


class StreamedLayers:
    """Reads each layer's weights from safetensors files before it runs, and drops them afterwards.

    The next layer is read while one runs, so at most two are in memory: that which followed the last time, else the one
    above, or the one below where they are asked for downward; after the last, the first. For a GPU they are read into
    pinned memory, from which a stream of their own copies them beside the computation, once the GPU has come to the
    layer before: the host may be ahead of it, and the memory of layers that have yet to run is not free.

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
                    hint="keep the model in memory (weights: memory)",
                )
        on_gpu = model.device.type == "cuda"
        # A new thread's device is the first GPU, on which pinning memory would make a context in every process.
        begin = partial(torch.cuda.set_device, model.device) if on_gpu else None
        self._reader = ThreadPoolExecutor(max_workers=1, initializer=begin)
        self._read_ahead: dict[int, Future[LayerWeights]] = {}
        self._place = (-1, True)  # the position that was loaded last, and whether that was upward
        self._followed: dict[tuple[int, bool], int] = {}  # the position that was loaded after it, the last time
        self._copies = torch.cuda.Stream(model.device) if on_gpu else None

    @contextmanager
    def weights_loaded(self, position: int) -> Iterator[None]:
        """Loads the weights of the layer at `position` while the context lasts, unless they are there."""
        layers = self._architecture.layers
        if not lacks_weights(layers[position]):
            yield
            return
        ready = self._read_ahead.pop(position, None) or self._reader.submit(self._read, position)
        self._read_ahead.clear()
        # When it happens, the GPU has done with the memory of the layers before.
        before = torch.cuda.current_stream(self.model.device).record_event() if self._copies else None
        layers[position].load_state_dict(ready.result().on_current_stream(), strict=False, assign=True)
        following = self._following(position)
        self._read_ahead[following] = self._reader.submit(self._read, following, before)
        try:
            yield
        finally:
            layer = layers[position]
            meta = {name: value.to("meta") for name, value in layer.state_dict().items()}
            layer.load_state_dict(meta, strict=False, assign=True)

    def drop_read_ahead(self) -> None:
        """Frees the layer that was read ahead, if nobody will ask for it."""
        self._read_ahead.clear()

    def _following(self, position: int) -> int:
        """Which layer is likely to be asked for after this one: a student has gaps, and a backward pass goes down."""
        self._followed[self._place] = position
        self._place = position, position > self._place[0] or not position
        beside = position + (1 if self._place[1] else -1)
        return self._followed.get(self._place, beside % len(self._architecture.layers))

    def _names(self, position: int) -> dict[str, str]:
        """The names of the layer's tensors, in its state dict and in the checkpoint."""
        prefix = f"{self._architecture.layer_prefix()}.{position}."
        return {name: prefix + name for name in self._architecture.layers[position].state_dict()}

    def _read(self, position: int, before: torch.cuda.Event | None = None) -> LayerWeights:
        """Reads a layer, for a GPU into pinned memory, and copies it there once `before` has happened."""
        names = self._names(position)
        files = {stored: self._files[stored] for stored in names.values()}
        if self._copies is None:
            tensors = read_tensors(files, self.model.device, self._dtypes)
            return LayerWeights({name: tensors[stored] for name, stored in names.items()})
        pinned = read_tensors(files, CPU, self._dtypes, pinned=True)
        if before is not None:
            before.synchronize()  # or memory would be taken beside that of layers that have yet to run
        with torch.cuda.stream(self._copies):
            on_gpu = {name: pinned[stored].to(self.model.device, non_blocking=True) for name, stored in names.items()}
            return LayerWeights(on_gpu, self._copies.record_event())


def lacks_weights(layer: nn.Module) -> bool:
    """Whether a layer has parameters that are not in memory now."""
    return any(parameter.is_meta for parameter in layer.parameters())


@dataclass(frozen=True)
class LayerWeights:
    """A layer's weights, which may still be on their way to the GPU.

    Attributes:
        tensors: by their names in the layer.
        copied: happens on the stream of the copies when all have arrived; None where they are here already.
    """

    tensors: Mapping[str, Tensor]
    copied: torch.cuda.Event | None = None

    def on_current_stream(self) -> Mapping[str, Tensor]:
        """The tensors, for what is asked of the current stream from here on; the host does not wait."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(next(iter(self.tensors.values())).device)
            stream.wait_event(self.copied)
            for tensor in self.tensors.values():
                tensor.record_stream(stream)  # or their memory is reused while the layer still computes
        return self.tensors


def load_streamed(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    revision: str | None = None,
    attn_implementation: str = "auto",
) -> tuple[StreamedLayers, PreTrainedTokenizerBase]:
    """Loads a causal language model but for its layers, which are read as they run.

    What is read, and what is refused, is the same as with `load_model`.

    Args, errors: as `load_model`.
    """
    config = load_config_of(path, trust_remote_code=trust_remote_code, revision=revision)
    _check_not_quantised(config, path)
    give_back_large_blocks()  # malloc would keep the layers that have run
    target, wanted = pick_device(device), wanted_dtype(config, pick_device(device), dtype)
    check_attention(attn_implementation, target, wanted)
    folder = local_folder(path, revision)
    outline = load_without_bytes(folder, config, path, dtype=wanted, trust_remote_code=trust_remote_code)
    dtypes = {name: tensor.dtype for name, tensor in outline.state_dict().items()}
    with init_empty_weights(include_buffers=False), kernel_of(attn_implementation, path) as kernel:
        model = AutoModelForCausalLM.from_config(
            runnable_config(config, announce=True), dtype=wanted, trust_remote_code=trust_remote_code, **kernel
        )
    files = {name: tensor.file for name, tensor in stored_tensors(folder).items()}
    _load_outside_layers(model, files, dtypes, target, path)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code, revision=revision)
    check_vocabulary(model, tokenizer, path)
    return StreamedLayers(model.eval().requires_grad_(False), files, dtypes, path), tokenizer


def _load_outside_layers(
    model: PreTrainedModel,
    files: Mapping[str, Path],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
    path: str | Path,
) -> None:
    """Loads all parameters but those of layers, and moves the buffers.

    Raises:
        InputError: the files lack one.
    """
    layers = f"{find_architecture(model).layer_prefix()}."
    outside = {n for n, _ in model.named_parameters(remove_duplicate=False) if not n.startswith(layers)}
    tensors = read_tensors({name: files[name] for name in outside if name in files}, device, dtypes)
    for name, tensor in tensors.items():
        set_module_tensor_to_device(model, name, device, value=tensor)
    missing = outside - set(tensors)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)  # removes tied weights from `missing`
    if missing:
        raise InputError(
            f"{path}: its parts cannot be read on their own: the files have no tensor {min(missing)}",
            hint="keep the model in memory (weights: memory)",
        )
    for name, buffer in model.named_buffers():
        set_module_tensor_to_device(model, name, device, value=buffer)


def _check_not_quantised(config: PretrainedConfig, path: str | Path) -> None:
    method = quantised_with(config)
    if method:
        raise InputError(
            f"{path}: the weights are quantised ({method}), and layers that are read one at a time stay as they are",
            hint="keep the model in memory (weights: memory), which undoes it where transformers can",
        )


def read_tensors(
    files: Mapping[str, Path], device: torch.device, dtypes: Mapping[str, torch.dtype], *, pinned: bool = False
) -> dict[str, Tensor]:
    """Reads tensors, by name, from their safetensors files, in the dtypes given; `pinned` for copies to a GPU."""
    tensors = {}
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as file:
            for name in (name for name, holder in files.items() if holder == path):
                value = file.get_tensor(name)
                # A copy, so that the file can be unmapped.
                if pinned:
                    held = torch.empty(value.shape, dtype=dtypes.get(name, value.dtype), pin_memory=True)
                    tensors[name] = held.copy_(value)
                else:
                    tensors[name] = value.to(device, dtypes.get(name), copy=True)
    return tensors
