"""What a model is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


def len_of(request: Request) -> int:
    """Tokens that a request takes, at most."""
    if isinstance(request, Generation):
        return len(request.prompt) + request.max_new_tokens
    return len(request.context) + len(request.continuation)


@dataclass(frozen=True)
class LogLikelihood:
    """The log-probability of `continuation` after `context`, which is never empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """Greedy text after `prompt`, cut at the first of `stop`."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...]


Request = LogLikelihood | Generation


class Likelihood(NamedTuple):
    """The answer to a `LogLikelihood`: summed natural log-probability, and whether greedy decoding gives the same."""

    log_probability: float
    greedy: bool


Answer = Likelihood | str
