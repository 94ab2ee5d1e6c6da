"""Rotary parameters in the form that was usual before transformers 5, for programs that read no other.

transformers 5 keeps them in `rope_parameters`. transformers 4, and what is built on it, reads `rope_theta`,
`rope_scaling` and `partial_rotary_factor` beside the other fields; where they are absent it takes a default, silently.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

# Families that have their own names for the base of all layers, and for the share of a head that is turned.
OWN_NAMES = {
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
    "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct"),
}
# Names of the base for each type of layers; in other families one `rope_theta` has to do for all.
LOCAL_BASE = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
BASES = {
    **dict.fromkeys(("gemma3_text", "gemma3n_text"), LOCAL_BASE),
    "modernbert-decoder": {"full_attention": "global_rope_theta", "sliding_attention": "local_rope_theta"},
}
LONGROPE_FIELDS = ("short_factor", "long_factor", "short_mscale", "long_mscale", "factor", "attention_factor")


def old_rotary_fields(config: PretrainedConfig) -> dict[str, Any]:
    """The fields, by the names of transformers 4, that say what `rope_parameters` says; none if they cannot.

    Args:
        config: of the language model itself (`text_config`).
    """
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict) or not parameters:
        return {}
    if all(isinstance(value, dict) for value in parameters.values()):
        return _of_layer_types(config, parameters)
    base, share = OWN_NAMES.get(config.model_type, ("rope_theta", "partial_rotary_factor"))
    return _flat(parameters, base, share)


def _flat(parameters: dict[str, Any], base: str, share: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if parameters.get("rope_theta") is not None:
        fields[base] = parameters["rope_theta"]
    if parameters.get("partial_rotary_factor") is not None:
        fields[share] = parameters["partial_rotary_factor"]
    kind = parameters.get("rope_type", "default")
    scaling = {
        name: value
        for name, value in parameters.items()
        if name not in ("rope_theta", "partial_rotary_factor") and value is not None
    }
    if kind == "longrope":  # phi3 accepts no other fields
        if "original_max_position_embeddings" in scaling:
            fields["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
        scaling = {"type": kind} | {name: scaling[name] for name in LONGROPE_FIELDS if name in scaling}
    if kind != "default" or scaling.keys() - {"rope_type", "type"}:
        fields["rope_scaling"] = scaling
    return fields


def _of_layer_types(config: PretrainedConfig, parameters: dict[str, dict[str, Any]]) -> dict[str, Any]:
    names = BASES.get(config.model_type, dict.fromkeys(parameters, "rope_theta"))
    if not parameters.keys() <= names.keys():
        return {}
    bases: dict[str, Any] = {}
    for kind, values in parameters.items():
        base = values.get("rope_theta")
        if base is None or bases.setdefault(names[kind], base) != base:
            return {}
    full = parameters.get("full_attention", {})
    return _flat(full, "rope_theta", "partial_rotary_factor") | bases
