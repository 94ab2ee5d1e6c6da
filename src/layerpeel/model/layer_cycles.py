"""Families whose kinds of layers follow a cycle that some runtimes take as fixed, whatever the config says.

Transformers reads a list with an entry for each layer, which a removal shortens with the layers. A runtime that counts
layers instead gives every layer behind a gap the attention (or the rotary embedding) of another.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PretrainedConfig

from layerpeel.errors import InputError
from layerpeel.model.config_fields import text_config

LAST_OF_A_CYCLE = ("full_attention", 0)  # in the lists of configs: attends to all tokens, or has no rotary embedding


@dataclass(frozen=True)
class LayerCycle:
    """A cycle of layers, whose last is of another kind than the others.

    Attributes:
        period: how many layers.
        fixed_in: runtimes that count layers.
        read_by: runtimes, other than transformers, that are known to read the list.
        field: of the config, with the list.
        measured: whether students were run; else what is said is read from the runtimes' source.
        in_gguf: whether a GGUF file can say which layers have a window, by an array that llama.cpp reads
            (`attention.sliding_window_pattern`), and nothing else follows the cycle; by its source, of version 11434.
    """

    period: int
    fixed_in: str = "llama.cpp"
    read_by: str = ""
    field: str = "layer_types"
    measured: bool = False
    in_gguf: bool = True


CYCLES = {
    "gemma3_text": LayerCycle(6, "llama.cpp, mlx-lm", "vLLM, CTranslate2", measured=True),
    "gemma2": LayerCycle(2),
    "cohere2": LayerCycle(4, "llama.cpp, mlx-lm"),
    "gpt_oss": LayerCycle(2),
    "afmoe": LayerCycle(4, in_gguf=False),  # layers without rotary embedding are counted
    "olmo3": LayerCycle(4),
    "exaone4": LayerCycle(4),
    "llama4_text": LayerCycle(4, in_gguf=False),
    "smollm3": LayerCycle(4, field="no_rope_layers", in_gguf=False),
}


def cycle_of(config: PretrainedConfig) -> LayerCycle | None:
    """The cycle that a model's layers follow; None if its family has none, or these layers do not follow it."""
    cycle = CYCLES.get(text_config(config).model_type)
    kinds = getattr(text_config(config), cycle.field, None) if cycle else None
    return cycle if cycle and kinds and _follow(list(kinds), cycle) else None


def keeps_cycle(config: PretrainedConfig, kept: Iterable[int]) -> bool:
    """Whether a model follows its cycle, if it has one, with only some of its layers.

    Args:
        kept: indices of the layers that stay, ascending.
    """
    cycle = cycle_of(config)
    if cycle is None:
        return True
    kinds = getattr(text_config(config), cycle.field)
    return _follow([kinds[index] for index in kept], cycle)


def broken_cycle(config: PretrainedConfig, kept: Iterable[int] | None = None) -> str | None:
    """What a removal means for other runtimes, in words; None if it leaves the cycle whole, or there is none.

    Args:
        kept: indices of the layers that stay, ascending; a removal that would break the cycle, if None.
    """
    cycle = cycle_of(config)
    if cycle is None or (kept is not None and keeps_cycle(config, kept)):
        return None
    return _in_words(config, cycle, "the removal breaks" if kept is not None else "removing single layers breaks")


def out_of_cycle(config: PretrainedConfig) -> str | None:
    """What other runtimes make of a model whose layers are not in its family's cycle, in words; None if they are."""
    cycle = CYCLES.get(text_config(config).model_type)
    if cycle is None or not getattr(text_config(config), cycle.field, None) or cycle_of(config):
        return None
    return _in_words(config, cycle, "the removal breaks")


def gguf_pattern(config: PretrainedConfig) -> list[bool] | None:
    """Which layers have an attention window, to be written into a GGUF file; None if llama.cpp takes the right ones.

    Raises:
        InputError: llama.cpp cannot be told.
    """
    if out_of_cycle(config) is None:
        return None
    cycle = CYCLES[text_config(config).model_type]
    if not cycle.in_gguf:
        raise InputError(
            f"llama.cpp cannot say which layers this {text_config(config).model_type} has left: {out_of_cycle(config)}",
            hint="remove whole cycles (score.protect.pattern: true), or use a runtime that reads the config's list",
        )
    return [kind not in LAST_OF_A_CYCLE for kind in getattr(text_config(config), cycle.field)]


def counted_pattern(config: PretrainedConfig) -> list[bool] | None:
    """Which layers have an attention window where a runtime counts on the cycle; None if the family has none."""
    cycle, total = CYCLES.get(text_config(config).model_type), text_config(config).num_hidden_layers
    if cycle is None or cycle.field != "layer_types":
        return None
    return [index % cycle.period != cycle.period - 1 for index in range(total)]


def _in_words(config: PretrainedConfig, cycle: LayerCycle, breaks: str) -> str:
    right = ", ".join(filter(None, ["transformers", cycle.read_by])).replace(", ", " and ", 1)
    source = "" if cycle.measured else " (by its source)"
    counting = cycle.fixed_in.replace(", ", " and ")
    family = text_config(config).model_type
    verb = "take" if " and " in counting else "takes"
    return (
        f"{breaks} the cycle of {cycle.period} layers that {counting} {verb} as fixed for {family}{source}: there the "
        f"student would compute something else; in {right} it is right"
    )


def cycle_breakers(config: PretrainedConfig) -> dict[int, str]:
    """The layers without which, one at a time, a model would not follow its cycle, each with the reason."""
    cycle, total = cycle_of(config), text_config(config).num_hidden_layers
    if cycle is None:
        return {}
    reason = f"the cycle of {cycle.period} layers would break (score.protect.pattern)"
    return {layer: reason for layer in range(total) if not keeps_cycle(config, [n for n in range(total) if n != layer])}


def _follow(kinds: list[object], cycle: LayerCycle) -> bool:
    return all(
        (kind in LAST_OF_A_CYCLE) == (index % cycle.period == cycle.period - 1) for index, kind in enumerate(kinds)
    )
