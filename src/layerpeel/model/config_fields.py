"""Config fields whose values depend on layer indices, in any family, and their values after layers are removed."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

PER_LAYER_LISTS = (  # one entry for each layer
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
# What families call the length of their context, in tokens.
CONTEXT_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_sequence_length",
    "max_seq_len",
    "max_seq_length",
    "seq_length",
    "seq_len",
    "model_max_length",
    "context_length",
    "max_context_length",
    "max_seqlen",
)
# Fields that limit how far back a layer attends.
ATTENTION_REACHES = ("sliding_window", "attention_chunk_size", "window_size")


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The language model's part of a config: all of it, unless the model is multimodal."""
    return config.get_text_config(decoder=True)


def context_length(config: PretrainedConfig) -> int | None:
    """Tokens of the longest text that the model was made for; None where its config does not say.

    Of a model that also reads images or audio, that of its language model.
    """
    lengths = [getattr(text_config(config), name, None) for name in CONTEXT_LENGTHS]
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def attention_reach(config: PretrainedConfig) -> int | None:
    """The shortest attention window of any layer, in tokens; None if every layer attends to all earlier tokens."""
    reaches = [getattr(text_config(config), name, None) for name in ATTENTION_REACHES]
    return min((reach for reach in reaches if isinstance(reach, int)), default=None)


def shortened_fields(config: PretrainedConfig, kept: list[int]) -> dict[str, Any]:
    """The config fields that change when only some layers stay, with their new values.

    Args:
        config: of the language model itself (`text_config`).
        kept: indices of the layers that stay, ascending.
    """
    total, values = config.num_hidden_layers, vars(config)
    fields: dict[str, Any] = {"num_hidden_layers": len(kept)}
    fields |= _shortened_lists(values, kept, total)
    fields |= _shortened_counters(values, kept, total)
    if (step := values.get("decoder_sparse_step") or 1) > 1:  # replaced by a list, which can say the same of any layers
        dense = {index for index in range(total) if (index + 1) % step}
        values = values | {"mlp_only_layers": sorted(dense.union(values.get("mlp_only_layers") or ()))}
        fields["decoder_sparse_step"] = 1
    for name in LAYER_INDEX_LISTS:
        if indices := values.get(name):
            fields[name] = [position for position, index in enumerate(kept) if index in indices]
    for period, offset in PERIODS:
        if period in values:
            fields |= _shortened_period(values, kept, period, offset)
    if overrides := config.to_dict().get("per_layer_config"):  # its keys are layer indices as strings
        by_index = {int(index): override for index, override in overrides.items()}
        fields["per_layer_config"] = {p: by_index[index] for p, index in enumerate(kept) if index in by_index}
    return fields


def _shortened_lists(values: dict[str, Any], kept: list[int], total: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name in PER_LAYER_LISTS:
        entries = values.get(name)
        if isinstance(entries, (list, tuple)) and len(entries) == total:
            fields[name] = [entries[index] for index in kept]
    for name in REPEATED_LISTS:
        if pattern := values.get(name):
            fields[name] = [pattern[index % len(pattern)] for index in kept]
    for name in RUN_LISTS:
        if runs := values.get(name):
            kinds = [kind for pattern, repeats in runs for _ in range(repeats) for kind in pattern]
            fields[name] = [[[kinds[index]], 1] for index in kept]
    return fields


def _shortened_counters(values: dict[str, Any], kept: list[int], total: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name in LAYER_COUNTERS:
        count = values.get(name)
        if isinstance(count, int) and count < total:  # a larger count means all layers, and still does
            fields[name] = sum(index < count for index in kept)
    for name in LAST_INDICES:
        if name in values:
            fields[name] = sum(index <= values[name] for index in kept) - 1
    for name in LAST_COUNTERS:
        if count := values.get(name):
            fields[name] = sum(index >= total - count for index in kept)
    return fields


def _shortened_period(values: dict[str, Any], kept: list[int], period: str, offset: str) -> dict[str, int]:
    """The period and offset that select the same layers among those `kept`; empty if no such pair exists."""
    selected = [index % values[period] == values[offset] for index in kept]
    for length in (values[period], *range(1, len(kept) + 2)):
        for first in range(length):
            if selected == [position % length == first for position in range(len(kept))]:
                return {period: length, offset: first}
    return {}


def rewrite_config(config: PretrainedConfig, kept: list[int]) -> None:
    """Rewrites a config (a `text_config`), in place, for the model with only the layers `kept`."""
    for name, value in shortened_fields(config, kept).items():
        setattr(config, name, value)
