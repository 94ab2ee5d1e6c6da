"""Config fields that say something of each layer, and their values once layers are gone."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

# Config fields, in whatever family they occur.
PER_LAYER_LISTS = (
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "no_rope_layers",
    "indexer_types",
    "attention_layers",
    "layer_rope_theta",
    "num_attention_heads_per_layer",
    "intermediate_size",
    "activation_sparsity_pattern",
)
REPEATED_LISTS = ("block_types",)  # a pattern that is repeated over the layers
RUN_LISTS = ("attention_types",)  # [[kinds, repeats], ...]
LAYER_COUNTERS = (  # "the first n layers are ..."
    "max_window_layers",
    "first_k_dense_replace",
    "num_dense_layers",
    "moe_layer_start_index",
)
LAST_INDICES = ("moe_layer_end_index",)  # "the layers up to this index are ..."
LAST_COUNTERS = ("num_kv_shared_layers",)  # "the last n layers are ..."
LAYER_INDEX_LISTS = (  # "the layers with these indices are ..."
    "mlp_only_layers",
    "moe_layers",
    "full_attn_idxs",
    "attn_layer_indices",
    "local_layer_ids",
)
PERIODS = (  # "the layers whose index divided by the period leaves the offset are ..."
    ("attn_layer_period", "attn_layer_offset"),
    ("expert_layer_period", "expert_layer_offset"),
)


# Fields that limit how far back a layer attends.
ATTENTION_REACHES = ("sliding_window", "attention_chunk_size", "window_size")


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a config that describes the language model: all of it, unless the model reads images or sound too."""
    return config.get_text_config(decoder=True)


def context_length(config: PretrainedConfig) -> int | None:
    """Tokens of the longest text that the model was made for; None where its config does not say."""
    length = getattr(text_config(config), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def attention_reach(config: PretrainedConfig) -> int | None:
    """Tokens that the shortest-sighted layer attends to; None if every layer sees all before."""
    reaches = [getattr(text_config(config), name, None) for name in ATTENTION_REACHES]
    return min((reach for reach in reaches if isinstance(reach, int)), default=None)


def shortened_fields(config: PretrainedConfig, kept: list[int]) -> dict[str, Any]:
    """The config fields that change when only the layers `kept` (indices, ascending) stay, with their new values.

    Args:
        config: of the language model itself (`text_config`).
    """
    total, own = config.num_hidden_layers, vars(config)
    fields: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name in PER_LAYER_LISTS:
        values = own.get(name)
        if isinstance(values, (list, tuple)) and len(values) == total:
            fields[name] = [values[index] for index in kept]
    for name in REPEATED_LISTS:
        if pattern := own.get(name):
            fields[name] = [pattern[index % len(pattern)] for index in kept]
    for name in RUN_LISTS:
        if runs := own.get(name):
            kinds = [kind for pattern, repeats in runs for _ in range(repeats) for kind in pattern]
            fields[name] = [[[kinds[index]], 1] for index in kept]
    for name in LAYER_COUNTERS:
        count = own.get(name)
        if isinstance(count, int) and count < total:  # a larger count means all layers, and still does
            fields[name] = sum(index < count for index in kept)
    for name in LAST_INDICES:
        if name in own:
            fields[name] = sum(index <= own[name] for index in kept) - 1
    for name in LAST_COUNTERS:
        if count := own.get(name):
            fields[name] = sum(index >= total - count for index in kept)
    if (step := own.get("decoder_sparse_step") or 1) > 1:  # the list says the same of any layers, and the step does not
        dense = {index for index in range(total) if (index + 1) % step}
        own = own | {"mlp_only_layers": sorted(dense.union(own.get("mlp_only_layers") or ()))}
        fields["decoder_sparse_step"] = 1
    for name in LAYER_INDEX_LISTS:
        if indices := own.get(name):
            fields[name] = [position for position, index in enumerate(kept) if index in indices]
    for period, offset in PERIODS:
        if period in own:
            fields |= _shortened_period(kept, own, period, offset)
    if overrides := config.to_dict().get("per_layer_config"):  # by layer, whose index is written as a word
        own_to = {int(index): values for index, values in overrides.items()}
        fields["per_layer_config"] = {p: own_to[index] for p, index in enumerate(kept) if index in own_to}
    return fields


def _shortened_period(kept: list[int], own: dict[str, Any], period: str, offset: str) -> dict[str, int]:
    """The period and offset that choose the same ones among the layers `kept`; none if there are no such numbers."""
    chosen = [index % own[period] == own[offset] for index in kept]
    for length in (own[period], *range(1, len(kept) + 2)):
        for first in range(length):
            if chosen == [position % length == first for position in range(len(kept))]:
                return {period: length, offset: first}
    return {}


def rewrite_config(config: PretrainedConfig, kept: list[int]) -> None:
    """Lets a config (a `text_config`) say that only the layers `kept` are there."""
    for name, value in shortened_fields(config, kept).items():
        setattr(config, name, value)
