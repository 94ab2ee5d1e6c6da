"""Which requests go together: in a process, in a batch, and in windows of what is too long for the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from layerpeel.inference.requests import Answer, Generation, Likelihood, LogLikelihood, Request, len_of

Order = Callable[[Request], tuple[int, ...]]


def kind_of(request: Request) -> tuple[Any, ...]:
    """What requests of one batch have in common."""
    if isinstance(request, Generation):
        return (1, request.stop, -request.max_new_tokens, repr(request.options))
    return (0, (), 0, "")


def longest_first(request: Request) -> tuple[int, ...]:
    """An order in which requests of similar length meet."""
    return (-len_of(request),)


def shared_beginnings(request: Request) -> tuple[int, ...]:
    """An order in which log-likelihoods with the same first tokens meet; other requests go longest first."""
    return request.context + request.continuation if isinstance(request, LogLikelihood) else longest_first(request)


def _by_kind(requests: Sequence[Request], order: Order) -> Iterator[list[int]]:
    """The indices of the requests of each kind, in order."""
    indices = sorted(range(len(requests)), key=lambda index: (kind_of(requests[index]), *order(requests[index])))
    for _, group in groupby(indices, key=lambda index: kind_of(requests[index])):
        yield [*group]


def share_of(requests: Sequence[Request], rank: int, world: int) -> list[int]:
    """The indices of the requests that one of `world` processes answers.

    All get about as many tokens of each kind, neighbours in the order together, whatever memory each of them has: so
    every process knows the same shares without asking the others.
    """
    share = []
    for number, group in enumerate(_by_kind(requests, shared_beginnings)):
        total, before = sum(len_of(requests[index]) for index in group), 0
        for index in group:
            middle = before + len_of(requests[index]) / 2
            if (int(world * middle / max(total, 1)) + number) % world == rank:
                share.append(index)
            before += len_of(requests[index])
    return sorted(share)


def batches_of(requests: Sequence[Request], tokens: int, order: Order) -> list[list[int]]:
    """Indices of requests that go together: of one kind, in order, padded to no more than so many tokens."""
    batches = []
    for group in _by_kind(requests, order):
        batch: list[int] = []
        longest = 0
        for index in group:
            longest = max(longest, len_of(requests[index]))
            if batch and longest * (len(batch) + 1) > tokens:
                batches.append(batch)
                batch, longest = [], len_of(requests[index])
            batch.append(index)
        batches.append(batch)
    return batches


def windows_of(request: Request, limit: int) -> list[Request]:
    """Cuts a log-likelihood that is too long for the model as lm-evaluation-harness does; others stay as they are.

    Each window has `limit` tokens and the one before them as context; the last has as much context as fits.
    """
    if isinstance(request, Generation) or len(request.continuation) <= limit:
        return [request]
    tokens, before = request.continuation, request.context[-1:] + request.continuation
    starts = range(0, len(tokens), limit)
    ends = [min(start + limit, len(tokens)) for start in starts]
    return [
        LogLikelihood(before[max(0, end - limit) : start + 1], tokens[start:end])
        for start, end in zip(starts, ends, strict=True)
    ]


def joined(answers: Sequence[Answer]) -> Answer:
    """The answer to a request from those to its windows."""
    parts = [answer for answer in answers if isinstance(answer, Likelihood)]
    if len(parts) < len(answers):
        return answers[0]
    return Likelihood(math.fsum(part.log_probability for part in parts), all(part.greedy for part in parts))
