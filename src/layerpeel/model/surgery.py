"""Removing layers: `KeptLayers` (which teacher layers a student still has), and surgery on a model and its config."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from layerpeel.errors import InputError
from layerpeel.model.architecture import INDEX_ATTRIBUTES, LIST_ATTRIBUTES, find_architecture
from layerpeel.model.config_check import check_config
from layerpeel.model.config_fields import PER_LAYER_LISTS, rewrite_config, text_config

Shared = TypeVar("Shared", bound=nn.Module)


@dataclass(frozen=True)
class KeptLayers:
    """Which of the teacher's layers a student still has; all arithmetic on layer indices is here.

    A *layer* is an index into the teacher's layers, a *position* an index into the student's. A *gap* is a maximal run
    of removed layers.

    Attributes:
        kept: the teacher's indices of the student's layers, ascending.
        total: number of the teacher's layers.
    """

    kept: tuple[int, ...]
    total: int

    @classmethod
    def full(cls, total: int) -> KeptLayers:
        return cls(tuple(range(total)), total)

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def removed(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.total) if layer not in self.kept)

    def without(self, layers: Iterable[int]) -> KeptLayers:
        """What is kept after these teacher layers are removed too.

        Raises:
            InputError: the student does not have one of the layers, or none would be left.
        """
        removed = set(layers)
        absent = sorted(removed - set(self.kept))
        if absent:
            raise InputError(
                f"layer {absent[0]} cannot be removed: the layers there are {_ranges(self.kept)}",
                hint="layers are counted from 0 and named by the teacher's index",
            )
        kept = tuple(layer for layer in self.kept if layer not in removed)
        if not kept:
            raise InputError("removing every layer leaves no model", hint="keep at least one layer")
        return KeptLayers(kept, self.total)

    def position(self, layer: int) -> int:
        """The position in the student of a teacher layer."""
        return self.kept.index(layer)

    @property
    def first_changed(self) -> int:
        """The first position whose layer is not the teacher's of the same index: the length of the shared prefix."""
        return next((p for p, layer in enumerate(self.kept) if layer != p), len(self.kept))

    @property
    def gaps(self) -> tuple[int, ...]:
        """For each gap, the position of the first layer after it; `len(self)` if the last layers are removed."""
        ends = (-1, *self.kept, self.total)
        return tuple(p for p in range(len(self.kept) + 1) if ends[p + 1] - ends[p] > 1)

    def neighbours(self, radius: int) -> tuple[int, ...]:
        """The kept layers within `radius` positions of a gap, on both sides."""
        near = {p for gap in self.gaps for p in range(gap - radius, gap + radius)}
        return tuple(layer for p, layer in enumerate(self.kept) if p in near)

    def above(self) -> tuple[int, ...]:
        """The kept layers after the first gap; the last kept layer if only layers after it are removed."""
        start = min((*self.gaps, len(self.kept) - 1)) if self.gaps else len(self.kept)
        return self.kept[start:]

    def removable(self, first: int = 1, last: int = 1, layers: Iterable[int] = ()) -> tuple[int, ...]:
        """The kept layers but for the teacher's `first` and `last` so many layers, and the listed ones."""
        protected = {*range(min(first, self.total)), *range(max(0, self.total - last), self.total), *layers}
        return tuple(layer for layer in self.kept if layer not in protected)


def share(module: Shared) -> Shared:
    """A second model or module with its own modules and config, and the same parameter and buffer tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, memo={id(tensor): tensor for tensor in tensors})


def remove_layers(model: PreTrainedModel, layers: Iterable[int]) -> PreTrainedModel:
    """Removes layers from a causal language model, in place, and rewrites its config to match.

    Args:
        model: any supported causal language model.
        layers: indices into the layers of this model, counted from 0.

    Returns:
        The same model.

    Raises:
        InputError: an index is out of range, no layer would be left, or the family's config cannot express the
            result; the model is then unchanged.
    """
    architecture = find_architecture(model)
    kept = list(KeptLayers.full(len(architecture.layers)).without(layers).kept)
    layers_kept = [architecture.layers[index] for index in kept]
    expected = check_config(model, kept)
    architecture.set_layers(layers_kept)
    _copy_index_attributes(model, expected, len(kept))
    rewrite_config(text_config(model.config), kept)
    return model


def _copy_index_attributes(model: PreTrainedModel, expected: PreTrainedModel, depth: int) -> None:
    """Copies layer indices and per-layer attributes from a model that was built with `depth` layers to `model`."""
    modules = dict(expected.named_modules(remove_duplicate=False))
    copied = (*INDEX_ATTRIBUTES, *PER_LAYER_LISTS, *LIST_ATTRIBUTES)
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in vars(modules[path]).items():
            counts_layers = type(value) is int and value == depth
            if name in vars(module) and (counts_layers or name in copied):
                setattr(module, name, value)


def _ranges(indices: tuple[int, ...]) -> str:
    contiguous = indices == tuple(range(len(indices)))
    return f"0 to {len(indices) - 1}" if contiguous else ", ".join(map(str, indices))
