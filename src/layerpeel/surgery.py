"""Removing layers: `Depth` (the surviving teacher layers), and the model and config without the others."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from layerpeel.architecture import find_architecture, shortened_fields
from layerpeel.errors import InputError


@dataclass(frozen=True)
class Depth:
    """Which of the teacher's layers survive. The one home of index arithmetic.

    A *layer* is a teacher index, a *position* an index into the student's shorter list.

    Attributes:
        kept: teacher indices of the surviving layers, ascending.
        total: number of the teacher's layers.
    """

    kept: tuple[int, ...]
    total: int

    @classmethod
    def full(cls, total: int) -> Depth:
        return cls(tuple(range(total)), total)

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def removed(self) -> tuple[int, ...]:
        return tuple(layer for layer in range(self.total) if layer not in self.kept)

    def without(self, layers: Iterable[int]) -> Depth:
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
        return Depth(kept, self.total)

    def position(self, layer: int) -> int:
        """The place of a surviving teacher layer in the student."""
        return self.kept.index(layer)

    @property
    def first_changed(self) -> int:
        """The first position at which the student no longer holds the teacher layer of the same index."""
        return next((p for p, layer in enumerate(self.kept) if layer != p), len(self.kept))

    @property
    def seams(self) -> tuple[int, ...]:
        """Positions before which layers are missing; `len(self)` if the last ones are."""
        ends = (-1, *self.kept, self.total)
        return tuple(p for p in range(len(self.kept) + 1) if ends[p + 1] - ends[p] > 1)

    def neighbours(self, radius: int) -> tuple[int, ...]:
        """Surviving layers within `radius` positions of a seam, on both sides."""
        near = {p for seam in self.seams for p in range(seam - radius, seam + radius)}
        return tuple(layer for p, layer in enumerate(self.kept) if p in near)

    def above(self) -> tuple[int, ...]:
        """Surviving layers from the first gap up (the last one, if only layers above it are missing)."""
        start = min((*self.seams, len(self.kept) - 1)) if self.seams else len(self.kept)
        return self.kept[start:]

    def removable(self, first: int = 1, last: int = 1, layers: Iterable[int] = ()) -> tuple[int, ...]:
        """Surviving layers that may go: all but the teacher's `first`, its `last`, and the listed ones."""
        protected = {*range(first), *range(self.total - last, self.total), *layers}
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
    kept = list(Depth.full(len(architecture.layers)).without(layers).kept)
    survivors = [architecture.layers[index] for index in kept]
    check_expressible(model.config, kept, survivors)
    architecture.set_layers(survivors)
    for position, layer in enumerate(survivors):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # where attention finds its part of the KV cache
                module.layer_idx = position  # type: ignore[assignment]
    _rewrite(model.config, kept)
    return model


def check_expressible(config: PretrainedConfig, kept: list[int], survivors: list[nn.Module]) -> None:
    """Checks that a model built from the rewritten config has layers like the surviving ones.

    A config that derives a property of a layer from its index (sparse steps, shared KV, scaling by depth) would
    load into another model than was pruned. So the layers that transformers builds from it are compared with the
    survivors: classes, tensor shapes, and every plain attribute.

    Raises:
        InputError: they differ; the message names the first difference.
    """
    shorter = copy.deepcopy(config)
    _rewrite(shorter, kept)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(shorter)
    for index, expected, layer in zip(kept, find_architecture(built).layers, survivors, strict=True):
        difference = _first_difference(expected, layer)
        if difference:
            raise InputError(
                f"a {config.model_type} config cannot express this removal: layer {index} would be loaded with "
                f"{difference}",
                hint="remove other layers, or protect this one (score.protect.layers)",
            )


def _rewrite(config: PretrainedConfig, kept: list[int]) -> None:
    for name, value in shortened_fields(config, kept).items():
        setattr(config, name, value)


def _first_difference(expected: nn.Module, actual: nn.Module) -> str | None:
    ours, theirs = dict(actual.named_modules()), dict(expected.named_modules())
    if ours.keys() != theirs.keys():
        return f"other modules ({', '.join(sorted(ours.keys() ^ theirs.keys())[:3])})"
    for name, module in ours.items():
        built = theirs[name]
        if type(module) is not type(built):
            return f"{name or 'the layer'} = {type(built).__name__} instead of {type(module).__name__}"
        mine, its = _plain_attributes(module), _plain_attributes(built)
        for key in sorted(mine.keys() & its.keys()):
            if mine[key] != its[key]:
                return f"{'.'.join(filter(None, (name, key)))} = {its[key]!r} instead of {mine[key]!r}"
    return None


def _plain_attributes(module: nn.Module) -> dict[str, object]:
    plain: dict[str, object] = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str, type(None)))
        and not name.startswith("_")
        and name not in ("training", "layer_idx")
    }
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    return plain | shapes


def _ranges(indices: tuple[int, ...]) -> str:
    whole = indices == tuple(range(len(indices)))
    return f"0 to {len(indices) - 1}" if whole else ", ".join(map(str, indices))
