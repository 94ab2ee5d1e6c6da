"""What a model's config says that runtimes are known to read wrongly, and what another's says otherwise."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from layerpeel.model.config_fields import attention_reach, text_config
from layerpeel.model.rotary_fields import old_rotary_fields

WINDOWED = ("sliding_attention", "chunked_attention")
NAMES = {
    "layers": "number of layers",
    "rope_theta": "rope base (rope_theta)",
    "sliding_window": "attention window",
    "sliding_layers": "window pattern (which layers attend to a window only)",
    "separate_head": "head",
}


def facts_of(config: PretrainedConfig) -> dict[str, Any]:
    """What a student's config says, by the keys of `NAMES`; a fact that it does not say is left out."""
    config = text_config(config)
    window, kinds = attention_reach(config), getattr(config, "layer_types", None)
    facts = {
        "layers": config.num_hidden_layers,
        "rope_theta": old_rotary_fields(config).get("rope_theta"),
        "sliding_window": window,
        "sliding_layers": [kind in WINDOWED for kind in kinds] if window and kinds else None,
        "separate_head": not config.tie_word_embeddings,
    }
    return {name: value for name, value in facts.items() if value is not None}


def differing_facts(student: dict[str, Any], other: dict[str, Any]) -> dict[str, str]:
    """The facts that both know and that differ, each in words."""
    return {
        name: f"{words}: {_in_words(student[name])} in the student, {_in_words(other[name])} there"
        for name, words in NAMES.items()
        if name in student and name in other and not _same(student[name], other[name])
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return list(map(bool, one)) == list(map(bool, other))
    return abs(one - other) <= 1e-5 * abs(one)  # headers keep floats in 32 bits


def _in_words(value: Any) -> str:
    if isinstance(value, list):
        return "".join("w" if each else "f" for each in value)  # window, full
    if isinstance(value, bool):
        return "with weights of its own" if value else "the embedding's weights"
    return f"{value:g}"
