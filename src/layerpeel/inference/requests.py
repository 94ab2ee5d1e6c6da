"""Requests to a model, and the answers to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class LogLikelihood:
    """The log-probability of `continuation` after `context`, which is never empty; both are token ids."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """Greedy text after `prompt` (token ids), cut at the first of `stop`.

    Attributes:
        options: names and values for transformers' `generate`, which takes all others from the model's
            generation_config, as lm-evaluation-harness has it; None for plain greedy decoding, whatever that holds.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...]
    options: tuple[tuple[str, float], ...] | None = None


Request = LogLikelihood | Generation


class Likelihood(NamedTuple):
    """The answer to a `LogLikelihood`.

    Attributes:
        log_probability: natural, summed over the continuation's tokens.
        greedy: whether greedy decoding gives the same tokens.
    """

    log_probability: float
    greedy: bool


Answer = Likelihood | str


def len_of(request: Request) -> int:
    """Tokens that a request takes, at most."""
    if isinstance(request, Generation):
        return len(request.prompt) + request.max_new_tokens
    return len(request.context) + len(request.continuation)
