"""Removing layers: `Depth` (the surviving teacher layers), and the model and config without the others."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from layerpeel.architecture import (
    ATTENTION_REACHES,
    INDEX_ATTRIBUTES,
    LIST_ATTRIBUTES,
    PER_LAYER_LISTS,
    find_architecture,
    shortened_fields,
    text_config,
)
from layerpeel.calls import LayerCalls, leaves
from layerpeel.errors import InputError

# Attributes that say a module's place, follow from the config's lists, or do not change what it computes.
NOT_COMPARED = {
    *INDEX_ATTRIBUTES, *LIST_ATTRIBUTES, "training", "name_or_path", "warnings_issued", "all_tied_weights_keys",
}  # fmt: skip


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
    expected = check_expressible(model, kept)
    architecture.set_layers(survivors)
    _take_places(model, expected, len(kept))
    _rewrite(text_config(model.config), kept)
    return model


def check_expressible(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """Checks that a model built from the rewritten config is the given one without the other layers.

    A config that derives a property of a layer from its index (sparse steps, shared KV, scaling by depth) would
    load into another model than was pruned. So what transformers builds from the config, as it would be read from
    disk, is compared: classes, tensor shapes and every plain attribute, of the layers that stay and of all around
    them; and what the base model's forward hands to each layer (masks, rotary embeddings).

    Returns:
        The model that was built, on the meta device.

    Raises:
        InputError: they differ; the message names the first difference.
    """
    built, difference = _build_shorter(model, kept)
    if difference or built is None:
        raise InputError(
            f"a {model.config.model_type} config cannot express this removal: {difference}",
            hint="remove other layers, or protect this one (score.protect.layers)",
        )
    return built


def fixed_layers(model: PreTrainedModel) -> dict[int, str]:
    """The layers that may not go next, each with the reason: what its config cannot express of the others."""
    total = len(find_architecture(model).layers)
    if total == 1:
        return {0: "no layer would be left"}
    found = {layer: _build_shorter(model, [n for n in range(total) if n != layer])[1] for layer in range(total)}
    return {layer: difference for layer, difference in found.items() if difference}


def first_difference(
    expected: nn.Module, actual: nn.Module, without: str = "", depths: tuple[int, int] | None = None
) -> str | None:
    """The first difference in structure between two modules: classes, shapes, or plain attributes of any part.

    Args:
        without: a part to leave out, by its name.
        depths: numbers of layers that may stand for each other, of the expected module and of the actual one.
    """

    def parts(module: nn.Module) -> dict[str, nn.Module]:
        named = module.named_modules(remove_duplicate=False)
        return {name: part for name, part in named if not without or not f"{name}.".startswith(f"{without}.")}

    ours, theirs = parts(actual), parts(expected)
    if ours.keys() != theirs.keys():
        return f"other modules ({', '.join(sorted(ours.keys() ^ theirs.keys())[:3])})"
    for name, module in ours.items():
        built = theirs[name]
        if type(module) is not type(built):
            return f"{name or 'the layer'} = {type(built).__name__} instead of {type(module).__name__}"
        mine, its = _plain_attributes(module), _plain_attributes(built)
        for key in sorted(mine.keys() & its.keys()):
            if mine[key] != its[key] and (its[key], mine[key]) != depths:
                return f"{'.'.join(filter(None, (name, key)))} = {_short(its[key])} instead of {_short(mine[key])}"
    return None


def _build_shorter(model: PreTrainedModel, kept: list[int]) -> tuple[PreTrainedModel | None, str | None]:
    """The model that the rewritten config gives, on the meta device, and how it differs from what is meant."""
    architecture = find_architecture(model)
    prefix, layers = architecture.layer_prefix(), architecture.layers
    gone = [p for n, layer in enumerate(layers) if n not in kept for p in layer.parameters()]
    if {id(p) for p in gone} & {id(p) for n in kept for p in layers[n].parameters()}:
        return None, "layers share their weights"
    try:
        config = _as_read_from_disk(model.config, kept)
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config, trust_remote_code=hasattr(config, "auto_map"))
    except Exception as error:  # whatever the family has against such a config
        return None, f"there would be no such model ({' '.join(str(error).split())})"
    stack = find_architecture(built).layers
    if len(stack) != len(kept):
        return None, f"{len(stack)} layers would be loaded instead of {len(kept)}"
    for index, expected in zip(kept, stack, strict=True):
        if difference := first_difference(expected, layers[index]):
            return None, f"layer {index} would be loaded with {difference}"
    if difference := first_difference(built, model, prefix, (len(kept), len(layers))):
        return None, f"the model would be loaded with {difference}"
    if _counts_tokens(model.config) and not _counts_tokens(config):
        return None, "no layer with a KV cache would be left"
    return built, _called_otherwise(model, kept)


def _counts_tokens(config: PretrainedConfig) -> bool:
    """Whether a cache for such a model knows how many tokens it holds: that of a recurrent layer does not."""
    try:
        return DynamicCache(config=config).get_seq_length() == 0
    except ValueError:
        return False


def _as_read_from_disk(config: PretrainedConfig, kept: list[int]) -> PretrainedConfig:
    shorter = copy.deepcopy(config)
    _rewrite(text_config(shorter), kept)
    again = type(config).from_dict(copy.deepcopy(shorter.to_diff_dict()))
    again._attn_implementation = config._attn_implementation
    return again


def _rewrite(config: PretrainedConfig, kept: list[int]) -> None:
    for name, value in shortened_fields(config, kept).items():
        setattr(config, name, value)


def _take_places(model: PreTrainedModel, built: PreTrainedModel, depth: int) -> None:
    """Tells the modules of a shortened model their places and its depth, as if it had been loaded."""
    modules = dict(built.named_modules(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in vars(modules[path]).items():
            counts = type(value) is int and value == depth and name in vars(module)
            if name in vars(module) and (counts or name in (*INDEX_ATTRIBUTES, *PER_LAYER_LISTS, *LIST_ATTRIBUTES)):
                setattr(module, name, value)


def _called_otherwise(model: PreTrainedModel, kept: list[int]) -> str | None:
    """Which layer would be handed other arguments by the base model's forward, once the config is rewritten."""
    architecture, config = find_architecture(model), text_config(model.config)
    inputs = {"input_ids": torch.arange(1, 9, device=architecture.device)[None]}
    every = list(architecture.layers)
    # Short sight, so that the masks of a few tokens show which layers have it.
    reaches = {name: 3 for name in ATTENTION_REACHES if isinstance(vars(config).get(name), int)}
    with torch.no_grad(), _changed(config, reaches):
        calls = LayerCalls(architecture)
        before = calls.record(inputs)[1]
        try:
            architecture.set_layers([every[index] for index in kept])
            with _changed(config, shortened_fields(config, kept)):
                after = calls.record(inputs)[1]
        finally:
            architecture.set_layers(every)
    for index, now in zip(kept, after, strict=True):
        ours, theirs = dict(leaves(before[index])), dict(leaves(now))
        for path, value in ours.items():
            if not _same(value, theirs.get(path)):
                return f"layer {index} would be given another {path[-1]}"
    return None


@contextmanager
def _changed(config: PretrainedConfig, fields: dict[str, Any]) -> Iterator[None]:
    before = dict(vars(config))
    try:
        for name, value in fields.items():
            setattr(config, name, value)
        yield
    finally:
        vars(config).clear()
        vars(config).update(before)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    plain = (bool, int, float, str, type(None))
    return one == other if isinstance(one, plain) and isinstance(other, plain) else type(one) is type(other)


def _plain_attributes(module: nn.Module) -> dict[str, object]:
    """Numbers, words and lists of them, and shapes; but not those that say the layer's place or the mode."""
    plain: dict[str, object] = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(module).items()
        if all(isinstance(leaf, (bool, int, float, str, type(None))) for _, leaf in leaves(value))
        and not name.startswith("_")
        and not (name in PER_LAYER_LISTS and isinstance(value, (list, tuple)))  # the config's own, compared through it
        and name not in NOT_COMPARED
    }
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    return plain | shapes | {name: tuple(b.shape) for name, b in module.named_buffers(recurse=False)}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _ranges(indices: tuple[int, ...]) -> str:
    whole = indices == tuple(range(len(indices)))
    return f"0 to {len(indices) - 1}" if whole else ", ".join(map(str, indices))
