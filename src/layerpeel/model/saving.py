"""Saving a model as its publisher would have: whole or not at all, loaded back and compared."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from layerpeel.errors import RunError, reason_of
from layerpeel.model.architecture import find_architecture
from layerpeel.model.config_check import first_difference
from layerpeel.model.forward_switches import runnable_config
from layerpeel.model.layer_names import find_layer_names
from layerpeel.model.loading import load_config_of
from layerpeel.model.new_tensors import NewTensor, write_tensors
from layerpeel.model.origin import Origin
from layerpeel.model.saved_config import student_config, write_fields
from layerpeel.model.side_files import carry_files, drop_absent_code
from layerpeel.model.tensor_files import DTYPES, main_dtype, stored_tensors
from layerpeel.processes.distributed import is_main_process
from layerpeel.storage.files import partial_of, replace_folder


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
    origin: Origin | None = None,
) -> None:
    """Writes a Hugging Face checkpoint, whole or not at all.

    An older checkpoint at `folder` is replaced once the new one is complete, and was loaded back and compared. Of
    several processes the first writes.

    Args:
        dtype: of tensors that `origin` does not have.
        origin: what the model was made from. Of tensors that are as they were loaded, the very bytes are written, and
            others in the dtype that they had; its config is changed where it must be, and its other files are carried.

    Raises:
        RunError: what was written is not the model in memory.
    """
    if not is_main_process():
        return
    unfinished = partial_of(folder)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    tensors = _Tensors(model, dtype, origin)
    write_tensors(unfinished, tensors.to_write())
    written = main_dtype(stored_tensors(unfinished)) or dtype
    if origin:
        carry_files(origin.folder, unfinished, code=origin.code)
        teacher = load_config_of(origin.folder, trust_remote_code=origin.code, merge_adapter=origin.merges_adapter)
        kept = origin.kept or range(len(find_architecture(model).layers))
        fields = student_config(origin.fields, teacher, kept, written).fields
        drop_absent_code(fields, unfinished)
    else:
        tokenizer.save_pretrained(unfinished)
        fields = student_config(model.config.to_diff_dict(), model.config, _all_layers(model), written).fields
        fields["architectures"] = [type(model).__name__]
    write_fields(fields, unfinished)
    check_saved(model, unfinished, written)
    replace_folder(unfinished, folder)


def _all_layers(model: PreTrainedModel) -> range:
    return range(len(find_architecture(model).layers))


@dataclass
class _Tensors:
    """A model's tensors under the names of checkpoints, beside those of its origin."""

    model: PreTrainedModel
    dtype: torch.dtype
    origin: Origin | None

    def to_write(self) -> list[NewTensor]:
        return [self._new(name, value) for name, value in self.state.items()]

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """By name, tied ones once; with experts apart, where checkpoints have them apart."""
        ignored = set(getattr(self.model, "_keys_to_ignore_on_save", None) or ())
        state = {name: value for name, value in self.model.state_dict().items() if name not in ignored}
        state = remove_tied_weights_from_state_dict(state, self.model)
        return revert_weight_conversion(self.model, state)

    @cached_property
    def _find(self) -> Callable[[str], str | None]:
        """Gives the name that a tensor has in the files of the origin."""
        if not self.origin or not self.origin.tensors:
            return lambda name: None
        architecture, stored = find_architecture(self.model), self.origin.tensors
        depth = len(architecture.layers)
        kept = self.origin.kept or tuple(range(depth))
        in_model = find_layer_names(self.state, architecture, depth)
        in_files = self.origin.names(architecture, kept[-1] + 1)
        if not in_model or not in_files:
            return lambda name: name if name in stored and not _numbered(name) else None

        def find(name: str) -> str | None:
            layer = in_model.layer_of(name)
            before = name if layer is None else in_model.renumbered(name, kept[layer])
            return in_model.find(before, stored, in_files.prefix)

        return find

    def _new(self, name: str, value: Tensor) -> NewTensor:
        original = self._find(name)
        stored = self.origin.tensors[original] if self.origin and original else None
        if stored is None or stored.shape != tuple(value.shape) or stored.dtype not in DTYPES:
            return NewTensor.of(name, value, self.dtype if value.is_floating_point() else None)
        return NewTensor.made(name, stored, lambda: value)


def _numbered(name: str) -> bool:
    return any(part.isdecimal() for part in name.split("."))


def check_saved(model: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    """Checks that transformers loads from a folder the model in memory, rounded to `dtype`.

    Compares the classes, shapes and plain attributes of all modules, and all parameters and buffers bit by bit: a
    forward reads nothing else but the config and its input, so the logits are equal too. The second model is loaded on
    the CPU in `dtype`, and needs as much memory as saving did.

    Raises:
        RunError: they differ, or it cannot be loaded; the message names the folder and the first difference.
    """
    loader = type(model) if getattr(model.config, "auto_map", None) else AutoModelForCausalLM
    try:
        config = runnable_config(type(model.config).from_pretrained(folder))
        loaded, info = loader.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        unmatched = sorted({*info["missing_keys"], *info["unexpected_keys"]})
        difference = f"other tensors ({', '.join(unmatched[:3])})" if unmatched else first_difference(loaded, model)
        difference = difference or _first_unequal_tensor(loaded, model)
    except Exception as error:  # transformers and remote code raise many types
        difference = f"an error ({reason_of(error)})"
    if difference:
        raise RunError(
            f"{folder}: the checkpoint that was just written loads with {difference}",
            hint="it is kept for inspection and must not be used; protect other layers (score.protect.layers), or "
            "report this with the model's config.json",
        )


def _first_unequal_tensor(loaded: PreTrainedModel, model: PreTrainedModel) -> str | None:
    loaded_tensors = dict([*loaded.named_parameters(), *loaded.named_buffers()])
    persistent = model.state_dict().keys()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        stored = loaded_tensors.get(name)
        if stored is not None and _equal_as_rounded(tensor.detach().cpu(), stored):
            continue
        if name in persistent or stored is None or not _follows(name, stored, model):
            return f"another value of {name}"
    return None


def _equal_as_rounded(tensor: Tensor, stored: Tensor) -> bool:
    """Whether two tensors are equal in the narrower of their dtypes, NaN being equal to NaN (unused rows may hold it).

    Files may hold more than a model in memory.
    """
    narrower = min((stored.dtype, tensor.dtype), key=lambda dtype: dtype.itemsize)
    one, other = tensor.to(narrower), stored.to(narrower)
    return torch.equal(one, other) or (
        one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    )


def _follows(name: str, buffer: Tensor, model: PreTrainedModel) -> bool:
    """Whether a buffer that is not stored has the value that the config gives it; some change with a text's length."""
    with init_empty_weights(include_buffers=False):
        fresh = dict(type(model)(copy.deepcopy(model.config)).named_buffers())
    return name in fresh and torch.equal(fresh[name].to(buffer.dtype), buffer)
