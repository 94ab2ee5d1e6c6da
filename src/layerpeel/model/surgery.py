"""Removing layers: `Depth` (the surviving teacher layers), and the model and config without the others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedModel

from layerpeel.errors import InputError
from layerpeel.model.architecture import INDEX_ATTRIBUTES, LIST_ATTRIBUTES, find_architecture
from layerpeel.model.config_check import check_config
from layerpeel.model.config_fields import PER_LAYER_LISTS, rewrite_config, text_config


@dataclass(frozen=True)
class KeptLayers:
    """Which of the teacher's layers survive. The one home of index arithmetic.

    A *layer* is a teacher index, a *position* an index into the student's shorter list.

    Attributes:
        kept: teacher indices of the surviving layers, ascending.
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
        """The depth after removing these teacher layers.

        Raises:
            InputError: a layer is not there (any more), or none would be left.
        """
        gone = set(layers)
        absent = sorted(gone - set(self.kept))
        if absent:
            raise InputError(
                f"layer {absent[0]} cannot be removed: the layers there are {_ranges(self.kept)}",
                hint="layers are counted from 0 and named by the teacher's index",
            )
        kept = tuple(layer for layer in self.kept if layer not in gone)
        if not kept:
            raise InputError("removing every layer leaves no model", hint="keep at least one layer")
        return KeptLayers(kept, self.total)

    def position(self, layer: int) -> int:
        """The place of a surviving teacher layer in the student."""
        return self.kept.index(layer)

    @property
    def first_changed(self) -> int:
        """The first position at which the student no longer holds the teacher layer of the same index."""
        return next((p for p, layer in enumerate(self.kept) if layer != p), len(self.kept))

    @property
    def gaps(self) -> tuple[int, ...]:
        """Positions before which layers are missing; `len(self)` if the last ones are."""
        ends = (-1, *self.kept, self.total)
        return tuple(p for p in range(len(self.kept) + 1) if ends[p + 1] - ends[p] > 1)

    def neighbours(self, radius: int) -> tuple[int, ...]:
        """Surviving layers within `radius` positions of a seam, on both sides."""
        near = {p for seam in self.gaps for p in range(seam - radius, seam + radius)}
        return tuple(layer for p, layer in enumerate(self.kept) if p in near)

    def above(self) -> tuple[int, ...]:
        """Surviving layers from the first gap up (the last one, if only layers above it are missing)."""
        start = min((*self.gaps, len(self.kept) - 1)) if self.gaps else len(self.kept)
        return self.kept[start:]

    def removable(self, first: int = 1, last: int = 1, layers: Iterable[int] = ()) -> tuple[int, ...]:
        """Surviving layers that may go: all but the teacher's `first`, its `last`, and the listed ones."""
        protected = {*range(min(first, self.total)), *range(max(0, self.total - last), self.total), *layers}
        return tuple(layer for layer in self.kept if layer not in protected)


def remove_layers(model: PreTrainedModel, layers: Iterable[int]) -> PreTrainedModel:
    """Removes layers from a causal language model, in place, and rewrites its config to match.

    Args:
        model: any supported causal language model.
        layers: indices into the model's own layers, counted from 0.

    Returns:
        The same model.

    Raises:
        InputError: an index is out of range, no layer would be left, or the family's config cannot express the
            result; the model is then unchanged.
    """
    architecture = find_architecture(model)
    kept = list(KeptLayers.full(len(architecture.layers)).without(layers).kept)
    survivors = [architecture.layers[index] for index in kept]
    expected = check_config(model, kept)
    architecture.set_layers(survivors)
    _take_places(model, expected, len(kept))
    rewrite_config(text_config(model.config), kept)
    return model


def _take_places(model: PreTrainedModel, built: PreTrainedModel, depth: int) -> None:
    """Tells the modules of a shortened model their places and its depth, as if it had been loaded."""
    modules = dict(built.named_modules(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in vars(modules[path]).items():
            counts = type(value) is int and value == depth and name in vars(module)
            if name in vars(module) and (counts or name in (*INDEX_ATTRIBUTES, *PER_LAYER_LISTS, *LIST_ATTRIBUTES)):
                setattr(module, name, value)


def _ranges(indices: tuple[int, ...]) -> str:
    whole = indices == tuple(range(len(indices)))
    return f"0 to {len(indices) - 1}" if whole else ", ".join(map(str, indices))
