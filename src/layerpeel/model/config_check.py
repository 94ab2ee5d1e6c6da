"""Whether a config can express a model without some of its layers: right, or refused.

A config that derives a property of a layer from its index (sparse steps, shared KV, scaling by depth) would load into
another model than was pruned. So what transformers builds from the rewritten config, as it would be read from disk, is
compared with what is meant.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from layerpeel.errors import InputError
from layerpeel.model.architecture import INDEX_ATTRIBUTES, LIST_ATTRIBUTES, find_architecture
from layerpeel.model.config_fields import (
    ATTENTION_REACHES,
    PER_LAYER_LISTS,
    rewrite_config,
    shortened_fields,
    text_config,
)
from layerpeel.model.layer_inputs import LayerInputRecorder, LayerInputs, leaves

# Attributes that say a module's place, follow from the config's lists, or do not change what it computes.
NOT_COMPARED = {
    *INDEX_ATTRIBUTES,
    *LIST_ATTRIBUTES,
    "training",
    "name_or_path",
    "warnings_issued",
    "all_tied_weights_keys",
}


def check_config(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """Checks that a model built from the rewritten config is the given one without the other layers.

    Compared are classes, tensor shapes and every plain attribute, of the layers that stay and of all around them; and
    what the base model's forward hands to each layer (masks, rotary embeddings).

    Args:
        model: stays as it is.
        kept: indices of the layers that stay, ascending.

    Returns:
        The model that was built, on the meta device.

    Raises:
        InputError: they differ; the message names the first difference.
    """
    comparison = _Comparison(model)
    if difference := comparison.difference(kept):
        raise InputError(
            f"a {model.config.model_type} config cannot express this removal: {difference}",
            hint="remove other layers, or protect this one (score.protect.layers)",
        )
    return comparison.built(kept).model


def unremovable_layers(model: PreTrainedModel) -> dict[int, str]:
    """The layers that may not go next, each with the reason: what its config cannot express of the others."""
    comparison, total = _Comparison(model), len(find_architecture(model).layers)
    if total == 1:
        return {0: "no layer would be left"}
    found = {layer: comparison.difference([n for n in range(total) if n != layer]) for layer in range(total)}
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


@dataclass
class _Built:
    """What a rewritten config gives, on the meta device, and what is wrong with it for any layers."""

    model: PreTrainedModel
    fault: str | None

    @cached_property
    def structures(self) -> list[dict[str, Any]]:
        return [_structure(layer) for layer in find_architecture(self.model).layers]


class _Comparison:
    """A model and what is built from its config without some layers; what many removals have in common is done once."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.architecture = model, find_architecture(model)
        self.config, self.layers = text_config(model.config), self.architecture.layers
        self._built: dict[str, _Built] = {}

    def difference(self, kept: list[int]) -> str | None:
        """How the model that the rewritten config gives differs from the one that is meant."""
        if self._shares_weights(kept):
            return "layers share their weights"
        try:
            built = self.built(kept)
        except Exception as error:  # whatever the family has against such a config
            return f"there would be no such model ({' '.join(str(error).split())})"
        layerwise = find_architecture(built.model).layers
        if len(layerwise) != len(kept):
            return f"{len(layerwise)} layers would be loaded instead of {len(kept)}"
        for index, expected, structure in zip(kept, layerwise, built.structures, strict=True):
            if self._structures[index] != structure and (other := first_difference(expected, self.layers[index])):
                return f"layer {index} would be loaded with {other}"
        return built.fault or self._called_otherwise(kept)

    def built(self, kept: list[int]) -> _Built:
        """The model that the rewritten config gives; the same config gives the same model."""
        shorter = copy.deepcopy(self.model.config)
        rewrite_config(text_config(shorter), kept)
        fields = shorter.to_diff_dict()
        key = json.dumps(fields, sort_keys=True, default=str)
        if key not in self._built:
            config = type(shorter).from_dict(copy.deepcopy(fields))  # as it would be read from disk
            config._attn_implementation = self.model.config._attn_implementation
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=hasattr(config, "auto_map"))
            self._built[key] = _Built(model, self._fault(model, len(kept)))
        return self._built[key]

    def _fault(self, built: PreTrainedModel, depth: int) -> str | None:
        prefix = self.architecture.layer_prefix()
        if difference := first_difference(built, self.model, prefix, (depth, len(self.layers))):
            return f"the model would be loaded with {difference}"
        if _counts_tokens(self.model.config) and not _counts_tokens(built.config):
            return "no layer with a KV cache would be left"
        return None

    def _shares_weights(self, kept: list[int]) -> bool:
        stay = {tensor for index in kept for tensor in self._tensors[index]}
        return any(not stay.isdisjoint(own) for index, own in enumerate(self._tensors) if index not in kept)

    @cached_property
    def _tensors(self) -> list[set[int]]:
        return [{id(parameter) for parameter in layer.parameters()} for layer in self.layers]

    @cached_property
    def _structures(self) -> list[dict[str, Any]]:
        return [_structure(layer) for layer in self.layers]

    def _called_otherwise(self, kept: list[int]) -> str | None:
        """Which layer would be handed other arguments by the base model's forward, once the config is rewritten."""
        before = self._arguments
        try:
            self.architecture.set_layers([self.layers[index] for index in kept])
            with _changed(self.config, shortened_fields(self.config, kept)):
                after = self._record()
        finally:
            self.architecture.set_layers(self.layers)
        for index, now in zip(kept, after, strict=True):
            theirs = dict(leaves(now))
            for path, value in leaves(before[index]):
                if not _same(value, theirs.get(path)):
                    return f"layer {index} would be given another {path[-1]}"
        return None

    @cached_property
    def _calls(self) -> LayerInputRecorder:
        return LayerInputRecorder(self.architecture)

    @cached_property
    def _arguments(self) -> list[LayerInputs]:
        return self._record()

    @torch.no_grad()
    def _record(self) -> list[LayerInputs]:
        """Arguments of each layer for a few tokens; with short sight, so that masks show which layers have it."""
        calls = self._calls
        ids = torch.arange(1, 9, device=self.architecture.device)[None]
        reaches = {name: 3 for name in ATTENTION_REACHES if isinstance(vars(self.config).get(name), int)}
        with _changed(self.config, reaches):
            return calls.record({"input_ids": ids})[1]


def _counts_tokens(config: PretrainedConfig) -> bool:
    """Whether a cache for such a model knows how many tokens it holds: that of a recurrent layer does not."""
    try:
        return DynamicCache(config=config).get_seq_length() == 0
    except ValueError:
        return False


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


def _structure(layer: nn.Module) -> dict[str, Any]:
    parts = layer.named_modules(remove_duplicate=False)
    return {name: (type(module), _plain_attributes(module)) for name, module in parts}


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
