"""Checks that a config can express a model without some of its layers, and refuses the removal if not.

Some configs derive a property of a layer from its index (sparse steps, shared KV, scaling by depth); after a removal
they would load as another model than the one that was pruned. So the model that transformers builds from the rewritten
config, on the meta device, is compared with the pruned one.
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

from layerpeel.errors import InputError, reason_of
from layerpeel.model.architecture import INDEX_ATTRIBUTES, LIST_ATTRIBUTES, find_architecture
from layerpeel.model.config_fields import (
    ATTENTION_REACHES,
    PER_LAYER_LISTS,
    rewrite_config,
    shortened_fields,
    text_config,
)
from layerpeel.model.forward_switches import SWITCHES
from layerpeel.model.layer_inputs import LayerInputRecorder, LayerInputs, leaves

# Attributes that hold a layer's index, are derived from the config's lists, or do not change what a module computes.
NOT_COMPARED = {
    *INDEX_ATTRIBUTES,
    *LIST_ATTRIBUTES,
    "training",
    "name_or_path",
    "warnings_issued",
    "all_tied_weights_keys",
    *SWITCHES,
}


def check_config(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """Checks that the rewritten config builds the given model without the other layers.

    Compares classes, tensor shapes and every plain attribute of all modules, and the arguments that the base model's
    forward passes to each layer (masks, rotary embeddings).

    Args:
        model: is not changed.
        kept: indices of the layers that stay, ascending.

    Returns:
        The model that was built, on the meta device.

    Raises:
        InputError: they differ; the message names the first difference.
    """
    check = _ConfigCheck(model)
    if difference := check.difference(kept):
        raise InputError(
            f"a {model.config.model_type} config cannot express this removal: {difference}",
            hint="remove other layers, or protect this one (score.protect.layers)",
        )
    return check.build(kept).model


def unremovable_layers(model: PreTrainedModel) -> dict[int, str]:
    """The layers that cannot be removed next, each with the reason: what the config could not express without it."""
    check, total = _ConfigCheck(model), len(find_architecture(model).layers)
    if total == 1:
        return {0: "no layer would be left"}
    differences = {layer: check.difference([n for n in range(total) if n != layer]) for layer in range(total)}
    return {layer: difference for layer, difference in differences.items() if difference}


def first_difference(
    expected: nn.Module, actual: nn.Module, without: str = "", depths: tuple[int, int] | None = None
) -> str | None:
    """The first difference in structure between two modules: submodules, classes, shapes or plain attributes.

    Args:
        without: name of a submodule to leave out.
        depths: numbers of layers of the expected module and of the actual one, which count as equal attributes.
    """

    def submodules(module: nn.Module) -> dict[str, nn.Module]:
        named = module.named_modules(remove_duplicate=False)
        return {name: submodule for name, submodule in named if not without or not f"{name}.".startswith(f"{without}.")}

    actual_modules, expected_modules = submodules(actual), submodules(expected)
    if actual_modules.keys() != expected_modules.keys():
        return f"other modules ({', '.join(sorted(actual_modules.keys() ^ expected_modules.keys())[:3])})"
    for name, module in actual_modules.items():
        built = expected_modules[name]
        if type(module) is not type(built):
            return f"{name or 'the layer'} = {type(built).__name__} instead of {type(module).__name__}"
        attributes, loaded = _plain_attributes(module), _plain_attributes(built)
        for key in sorted(attributes.keys() & loaded.keys()):
            value, other = attributes[key], loaded[key]
            if value != other and (other, value) != depths:
                return f"{'.'.join(filter(None, (name, key)))} = {_short(other)} instead of {_short(value)}"
    return None


@dataclass
class _BuiltModel:
    """The model that a rewritten config builds, on the meta device.

    Attributes:
        difference: from the pruned model, outside the layers.
    """

    model: PreTrainedModel
    difference: str | None

    @cached_property
    def structures(self) -> list[dict[str, Any]]:
        return [_structure(layer) for layer in find_architecture(self.model).layers]


class _ConfigCheck:
    """Compares a model with those that its config builds without some layers; caches what several removals share."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.architecture = model, find_architecture(model)
        self.config, self.layers = text_config(model.config), self.architecture.layers
        self._built: dict[str, _BuiltModel] = {}

    def difference(self, kept: list[int]) -> str | None:
        """The first difference between the model that the rewritten config builds and the pruned one."""
        if self._shares_weights(kept):
            return "layers share their weights"
        try:
            built = self.build(kept)
        except Exception as error:  # families reject configs with many types
            return f"there would be no such model ({reason_of(error)})"
        built_layers = find_architecture(built.model).layers
        if len(built_layers) != len(kept):
            return f"{len(built_layers)} layers would be loaded instead of {len(kept)}"
        for index, expected, structure in zip(kept, built_layers, built.structures, strict=True):
            if self._structures[index] != structure and (other := first_difference(expected, self.layers[index])):
                return f"layer {index} would be loaded with {other}"
        return built.difference or self._argument_difference(kept)

    def build(self, kept: list[int]) -> _BuiltModel:
        """The model that the rewritten config builds; removals that give the same config share it."""
        rewritten = copy.deepcopy(self.model.config)
        rewrite_config(text_config(rewritten), kept)
        fields = rewritten.to_diff_dict()
        key = json.dumps(fields, sort_keys=True, default=str)
        if key not in self._built:
            config = type(rewritten).from_dict(copy.deepcopy(fields))  # as it would be read from disk
            config._attn_implementation = self.model.config._attn_implementation
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=has_own_code(self.model))
            self._built[key] = _BuiltModel(model, self._outer_difference(model, len(kept)))
        return self._built[key]

    def _outer_difference(self, built: PreTrainedModel, depth: int) -> str | None:
        prefix = self.architecture.layer_prefix()
        if difference := first_difference(built, self.model, prefix, (depth, len(self.layers))):
            return f"the model would be loaded with {difference}"
        if _counts_tokens(self.model.config) and not _counts_tokens(built.config):
            return "no layer with a KV cache would be left"
        return None

    def _shares_weights(self, kept: list[int]) -> bool:
        """Whether a layer that stays shares a parameter with one that is removed."""
        kept_tensors = {tensor for index in kept for tensor in self._tensors[index]}
        return any(not kept_tensors.isdisjoint(ids) for index, ids in enumerate(self._tensors) if index not in kept)

    @cached_property
    def _tensors(self) -> list[set[int]]:
        return [{id(parameter) for parameter in layer.parameters()} for layer in self.layers]

    @cached_property
    def _structures(self) -> list[dict[str, Any]]:
        return [_structure(layer) for layer in self.layers]

    def _argument_difference(self, kept: list[int]) -> str | None:
        """The first layer to which the base model's forward passes other arguments with the rewritten config."""
        before = self._arguments
        try:
            self.architecture.set_layers([self.layers[index] for index in kept])
            with _changed(self.config, shortened_fields(self.config, kept)):
                after = self._record()
        finally:
            self.architecture.set_layers(self.layers)
        for index, now in zip(kept, after, strict=True):
            arguments = dict(leaves(now))
            for path, value in leaves(before[index]):
                if not _same(value, arguments.get(path)):
                    return f"layer {index} would be given another {path[-1]}"
        return None

    @cached_property
    def _recorder(self) -> LayerInputRecorder:
        return LayerInputRecorder(self.architecture)

    @cached_property
    def _arguments(self) -> list[LayerInputs]:
        return self._record()

    @torch.no_grad()
    def _record(self) -> list[LayerInputs]:
        """Each layer's arguments for eight tokens, with attention windows cut to 3 so that the masks show them."""
        ids = torch.arange(8, device=self.architecture.device)[None] % min(8, self._recorder.vocabulary - 1) + 1
        reaches = {name: 3 for name in ATTENTION_REACHES if isinstance(vars(self.config).get(name), int)}
        with _changed(self.config, reaches):
            return self._recorder.record({"input_ids": ids})[1]


def _counts_tokens(config: PretrainedConfig) -> bool:
    """Whether the KV cache of such a model knows its sequence length; one with only recurrent layers does not."""
    try:
        return DynamicCache(config=config).get_seq_length() == 0
    except ValueError:
        return False


@contextmanager
def _changed(config: PretrainedConfig, fields: dict[str, Any]) -> Iterator[None]:
    """Sets fields of the config while the context lasts."""
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
    modules = layer.named_modules(remove_duplicate=False)
    return {name: (type(module), _plain_attributes(module)) for name, module in modules}


def _plain_attributes(module: nn.Module) -> dict[str, object]:
    """A module's attributes of plain types, and the shapes of its tensors; without those in NOT_COMPARED."""
    plain: dict[str, object] = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in vars(module).items()
        if all(isinstance(leaf, (bool, int, float, str, type(None))) for _, leaf in leaves(value))
        and not name.startswith("_")
        and not (name in PER_LAYER_LISTS and isinstance(value, (list, tuple)))  # compared through the config
        and name not in NOT_COMPARED
    }
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    return plain | shapes | {name: tuple(b.shape) for name, b in module.named_buffers(recurse=False)}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def has_own_code(model: PreTrainedModel) -> bool:
    """Whether a model is of a class that came with its checkpoint: only then may code of the checkpoint run again."""
    return not type(model).__module__.startswith("transformers.")
