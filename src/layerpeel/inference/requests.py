"""Requests to a model, and the answers to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
        needed: new tokens without which the answer could not be right. Where the context is too short for the prompt
            and `max_new_tokens`, fewer new tokens are given up to that number, before the prompt is cut; None: the
            prompt is cut at once, as lm-evaluation-harness does.
        options: names and values for transformers' `generate`, which takes all others from the model's
            generation_config, as lm-evaluation-harness has it; None for plain greedy decoding, whatever that holds.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...]
    needed: int | None = None
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


def fitted(request: Request, window: int) -> Request:
    """A request that fits into a context of `window` tokens: the beginning of what is too long is cut.

    A continuation that is longer than the window is left to be read in parts.
    """
    if isinstance(request, LogLikelihood):
        room = window + 1 - len(request.continuation)  # the last token is only predicted
        return (
            request
            if len(request.context) <= room or room <= 0
            else LogLikelihood(request.context[-room:], request.continuation)
        )
    new = request.max_new_tokens
    if request.needed is not None:
        new = min(new, max(request.needed, window - len(request.prompt)))
    return replace(request, prompt=request.prompt[-max(1, window - new) :], max_new_tokens=new)


def is_cut(request: Request, window: int) -> bool:
    """Whether `fitted` leaves out tokens of the context or the prompt."""
    part = fitted(request, window)
    if isinstance(request, LogLikelihood) and isinstance(part, LogLikelihood):
        in_parts = len(request.continuation) > window  # after the context's last token
        return len(part.context) < len(request.context) or (in_parts and len(request.context) > 1)
    return isinstance(request, Generation) and isinstance(part, Generation) and len(part.prompt) < len(request.prompt)


def len_of(request: Request) -> int:
    """Tokens that a request takes, at most."""
    if isinstance(request, Generation):
        return len(request.prompt) + request.max_new_tokens
    return len(request.context) + len(request.continuation)
