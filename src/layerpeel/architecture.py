"""All that is known of a model family: where its layers and its final norm are, and which config fields are per layer.

A family is a row of `FAMILIES`. A family without a row works too, if its layers can be found without doubt; what its
config cannot express is then refused by `surgery.check_expressible`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from layerpeel.errors import InputError


@dataclass(frozen=True)
class Family:
    """Where a family keeps its parts, as attribute names of its base model."""

    layers: str = "layers"
    norm: str = "norm"


FAMILIES = {
    "gemma2": Family(),
    "gemma3_text": Family(),
    "gpt2": Family(layers="h", norm="ln_f"),
    "gpt_neox": Family(norm="final_layer_norm"),
    "llama": Family(),
    "mistral": Family(),
    "olmo2": Family(),
    "phi3": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
}

# Config fields, in whatever family they occur.
PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "indexer_types", "attention_types")
LAYER_COUNTERS = ("max_window_layers", "first_k_dense_replace")  # "the first n layers are ..."
LAYER_INDEX_LISTS = ("mlp_only_layers",)  # "the layers with these indices are ..."

# Fields that limit how far back a layer attends.
ATTENTION_REACHES = ("sliding_window", "attention_chunk_size", "window_size")

FINAL_NORM_NAMES = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")


@dataclass(frozen=True)
class Architecture:
    """The parts of one causal language model."""

    base: nn.Module
    base_name: str
    family: Family

    @property
    def layers(self) -> nn.ModuleList:
        return getattr(self.base, self.family.layers)

    def set_layers(self, layers: list[nn.Module]) -> None:
        setattr(self.base, self.family.layers, nn.ModuleList(layers))

    @property
    def norm(self) -> nn.Module:
        return getattr(self.base, self.family.norm)

    def layer_prefix(self) -> str:
        """The name of the layer list in the causal model's state dict, such as `model.layers`."""
        return f"{self.base_name}.{self.family.layers}"


def find_architecture(model: PreTrainedModel) -> Architecture:
    """Finds the layers and the final norm of a causal language model.

    Raises:
        InputError: the family has no row, and its layers or norm cannot be found without doubt.
    """
    family = FAMILIES.get(model.config.model_type) or _guess_family(model)
    return Architecture(model.base_model, model.base_model_prefix, family)


def attention_reach(config: PretrainedConfig) -> int | None:
    """Tokens that the shortest-sighted layer attends to; None if every layer sees all before."""
    reaches = [getattr(config, name, None) for name in ATTENTION_REACHES]
    return min((reach for reach in reaches if isinstance(reach, int)), default=None)


def shortened_fields(config: PretrainedConfig, kept: list[int]) -> dict[str, Any]:
    """The config fields that change when only the layers `kept` (indices, ascending) stay, with their new values."""
    total = config.num_hidden_layers
    fields: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name in PER_LAYER_LISTS:
        values = getattr(config, name, None)
        if isinstance(values, (list, tuple)) and len(values) == total:
            fields[name] = [values[index] for index in kept]
    for name in LAYER_COUNTERS:
        count = getattr(config, name, None)
        if isinstance(count, int) and count < total:  # a larger count means all layers, and still does
            fields[name] = sum(index < count for index in kept)
    for name in LAYER_INDEX_LISTS:
        indices = getattr(config, name, None)
        if indices:
            fields[name] = [position for position, index in enumerate(kept) if index in indices]
    return fields


def _guess_family(model: PreTrainedModel) -> Family:
    base, total = model.base_model, getattr(model.config, "num_hidden_layers", None)
    lists = [n for n, m in base.named_children() if isinstance(m, nn.ModuleList) and len(m) == total]
    norms = [n for n, _ in base.named_children() if n in FINAL_NORM_NAMES]
    if len(lists) != 1 or len(norms) != 1:
        raise InputError(
            f"model family '{model.config.model_type}' is not known, and its layers cannot be found without doubt: "
            f"expected one list of {total} layers and one final norm in {type(base).__name__}, "
            f"found lists {lists} and norms {norms}",
            hint=f"families with a row of their own: {', '.join(sorted(FAMILIES))}",
        )
    return Family(layers=lists[0], norm=norms[0])
