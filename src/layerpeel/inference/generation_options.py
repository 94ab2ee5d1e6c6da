"""Options of transformers' `generate` that change greedy text: those that are followed, and those that are refused.

They hold for requests that keep the model's generation_config, as lm-evaluation-harness does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from layerpeel.errors import InputError
from layerpeel.inference.requests import Generation

FOLLOWED = ("repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "bad_words_ids")
# Each with the values at which it changes nothing.
GREEDY_OPTIONS: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "guidance_scale": (1.0,),
    "remove_invalid_values": (False,),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "token_healing": (False,),
    **dict.fromkeys(
        [
            "penalty_alpha",
            "exponential_decay_length_penalty",
            "force_words_ids",
            "constraints",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "sequence_bias",
            "watermarking_config",
            "dola_layers",
            "stop_strings",
            "max_time",
        ],
        (),
    ),
}
# Options that change nothing while no samples are drawn and no beams are searched.
WITHOUT_EFFECT = frozenset(
    {
        *("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("length_penalty", "early_stopping", "renormalize_logits"),
    }
)


def changes_text(name: str, value: Any) -> bool:
    """Whether an option, set to this value, can make greedy text another."""
    return not (value is None or name in WITHOUT_EFFECT or value in GREEDY_OPTIONS.get(name, ()))


def followed_options(request: Generation, config: GenerationConfig | None, task: str) -> dict[str, Any]:
    """What `generate` has to be told for a request that keeps the model's generation_config.

    Args:
        config: the model's.
        task: what the request is of, for messages.

    Raises:
        InputError: an option is set that cannot be followed for all candidates at once.
    """
    if request.options is None:
        return {}
    options = dict(request.options)
    values: Mapping[str, Any] = {name: getattr(config, name, None) for name in GREEDY_OPTIONS} | options
    changed = {name: value for name, value in values.items() if changes_text(name, value)}
    for name, value in changed.items():
        if name not in FOLLOWED:
            raise InputError(
                f"task {task}: the model's generation_config sets {name} to {value!r:.60}, which lm-evaluation-harness "
                "would follow and which cannot be followed here",
                hint=f"take {name} out of the model's generation_config.json, or leave the task out",
            )
    return changed


def generation_limit(request: Generation, config: GenerationConfig | None) -> int:
    """New tokens, at most: a generation_config that is kept and sets `max_new_tokens` has the last word there."""
    kept = getattr(config, "max_new_tokens", None) if request.options is not None else None
    return kept or request.max_new_tokens


def check_room(request: Generation, window: int, task: str) -> None:
    """Refuses a request of the harness's that leaves its prompt no room.

    Raises:
        InputError: it asks for as many new tokens as the model's context has, or more.
    """
    if request.options is not None and request.max_new_tokens >= window:
        raise InputError(
            f"task {task}: max_gen_toks is {request.max_new_tokens}, but the model's context has {window} tokens, "
            "which leaves none for the prompt",
            hint="set generation_kwargs: {max_gen_toks: ...} in the task's YAML",
        )
