"""Answers a task's requests, for the model as it is and for every candidate skipped, in one pass.

Answers come as one list a stream: the untouched model first, then each candidate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import Cache, PreTrainedTokenizerBase

from layerpeel.inference.answer_cache import AnswerCache
from layerpeel.inference.budget import Budget
from layerpeel.inference.decoding import Decoder
from layerpeel.inference.kv_cache import PrefillCache
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.likelihoods import log_likelihoods, window_length
from layerpeel.inference.requests import Answer, Generation, Likelihood, LogLikelihood, Request, len_of
from layerpeel.processes.interrupts import stop_if_asked
from layerpeel.processes.progress import Advance, progress


class Engine:
    """Answers requests on one stack, all candidates at once, within a budget of memory.

    Args:
        candidates: positions to skip, ascending.
        budget: shared with whoever else works on the stack.
        store: answers that were given before, and a place for new ones.
    """

    def __init__(
        self,
        layerwise: LayerwiseModel,
        tokenizer: PreTrainedTokenizerBase,
        candidates: Sequence[int] = (),
        *,
        budget: Budget | None = None,
        answer_cache: AnswerCache | None = None,
    ) -> None:
        self.layerwise, self.tokenizer, self.candidates = layerwise, tokenizer, candidates
        self.budget = budget or Budget(None, layerwise.device)
        self.answer_cache = answer_cache

    @property
    def streams(self) -> int:
        return 1 + len(self.candidates)

    def answer(self, requests: Sequence[Request], description: str = "answering") -> list[list[Answer]]:
        """Answers requests of both kinds, in their order; processes share the work.

        Returns:
            1 + C lists of answers.

        Raises:
            RunError: memory does not suffice for a single row.
        """
        windows = [_windows(request, window_length(self.layerwise)) for request in requests]
        streams = []
        for answers in self._answer([window for own in windows for window in own], description):
            rest = iter(answers)
            streams.append([_joined([next(rest) for _ in own]) for own in windows])
        return streams

    def _answer(self, requests: Sequence[Request], description: str) -> list[list[Answer]]:
        state = PartialState(cpu=self.layerwise.device.type == "cpu")
        own = sorted(i for batch in self._batches(requests)[state.process_index :: state.num_processes] for i in batch)
        answers: dict[int, list[Answer]] = {}
        with progress(description, len(own)) as advance:
            while left := [index for index in own if index not in answers]:
                self._answer_while_memory_lasts(requests, left, answers, advance)
        if state.num_processes > 1:
            for part in gather_object([answers]):
                answers |= part
        return [[answers[index][stream] for index in range(len(requests))] for stream in range(self.streams)]

    def _answer_while_memory_lasts(
        self, requests: Sequence[Request], left: list[int], answers: dict[int, list[Answer]], advance: Advance
    ) -> None:
        try:
            for batch in self._batches([requests[index] for index in left]):
                chosen = [left[index] for index in batch]
                for index, own in zip(chosen, self._answer_batch([requests[i] for i in chosen]), strict=True):
                    answers[index] = own
                advance(len(batch))
                stop_if_asked()
        except Exception as error:
            self.budget.shrink(error, self.layerwise, self.streams, max(map(len_of, requests)))

    def _answer_batch(self, requests: Sequence[Request]) -> list[list[Answer]]:
        """[requests][1 + C]; all of one kind."""
        found = self.answer_cache.find(requests, self.candidates) if self.answer_cache is not None else None
        if found:
            return found
        if isinstance(requests[0], Generation):
            answers = self._write([r for r in requests if isinstance(r, Generation)])
        else:
            answers = self._read([r for r in requests if isinstance(r, LogLikelihood)])
        if self.answer_cache is not None:
            self.answer_cache.keep(requests, self.candidates, answers)
        return answers

    def _read(self, requests: Sequence[LogLikelihood]) -> list[list[Answer]]:
        sums, same = log_likelihoods(self.layerwise, self.candidates, requests)
        greedy = same == torch.tensor([len(request.continuation) for request in requests])
        columns = zip(sums.T.tolist(), greedy.T.tolist(), strict=True)
        return [[Likelihood(*both) for both in zip(*own, strict=True)] for own in columns]

    def _write(self, requests: Sequence[Generation]) -> list[list[Answer]]:
        """Greedy text for each prompt, on all streams; all requests have the same stops and limit.

        The model as it is writes first. In one walk, every candidate then reads what was written: where greedy decoding
        gives the same, it is the candidate's text too. From where it does not, the candidates write on, in one loop.
        """
        decoder = Decoder(self.layerwise, self.tokenizer, requests[0].stop, requests[0].max_new_tokens)
        prompts = [r.prompt[-max(1, window_length(self.layerwise) - r.max_new_tokens) :] for r in requests]
        texts = {(index, 0): own for index, own in enumerate(decoder.write(prompts, [None] * len(prompts)))}
        if self.candidates:
            asked = [LogLikelihood(prompt, tuple(texts[index, 0])) for index, prompt in enumerate(prompts)]
            keys = PrefillCache(self.candidates)
            same = log_likelihoods(self.layerwise, self.candidates, asked, keys)[1].T.tolist()
            rows = [(index, stream) for index in range(len(prompts)) for stream in range(1, self.streams)]
            begun = [texts[index, 0][: same[index][stream]] for index, stream in rows]
            skipped = [self.candidates[stream - 1] for _, stream in rows]

            def known(chosen: Sequence[int], lengths: Sequence[int]) -> Cache | None:
                indices, streams = zip(*(rows[row] for row in chosen), strict=True)
                return keys.cache_of(indices, streams, lengths, self.layerwise.model.config)

            written = decoder.write([prompts[index] for index, _ in rows], skipped, begun, known)
            texts |= dict(zip(rows, written, strict=True))
        return [[decoder.text(texts[index, stream]) for stream in range(self.streams)] for index in range(len(prompts))]

    def _batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indices of requests that go together: of one kind, within the budget.

        In trees, log-likelihoods go by their tokens, so that shared beginnings meet; all else goes longest first, so
        that rows are of like length.
        """
        budget = self.budget.tokens(self.layerwise, self.streams)
        batches = []
        order = sorted(range(len(requests)), key=lambda index: (_kind(requests[index]), *self._order(requests[index])))
        for _, group in groupby(order, key=lambda index: _kind(requests[index])):
            batch: list[int] = []
            longest = 0
            for index in group:
                longest = max(longest, len_of(requests[index]))
                if batch and longest * (len(batch) + 1) > budget:
                    batches.append(batch)
                    batch, longest = [], len_of(requests[index])
                batch.append(index)
            batches.append(batch)
        return batches

    def _order(self, request: Request) -> tuple[int, ...]:
        if isinstance(request, LogLikelihood) and self.layerwise.runs_trees:
            return request.context + request.continuation
        return (-len_of(request),)


def _windows(request: Request, limit: int) -> list[Request]:
    """A log-likelihood too long for the model, in the parts that lm-evaluation-harness cuts it to; all else whole.

    Each part has `limit` tokens and the one before them as context, the last has as much context as there is room for.
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


def _joined(answers: Sequence[Answer]) -> Answer:
    """The answer to a request from those to its windows."""
    parts = [answer for answer in answers if isinstance(answer, Likelihood)]
    if len(parts) < len(answers):
        return answers[0]
    return Likelihood(math.fsum(part.log_probability for part in parts), all(part.greedy for part in parts))


def _kind(request: Request) -> tuple[Any, ...]:
    if isinstance(request, Generation):
        return (1, request.stop, -request.max_new_tokens)
    return (0, (), 0)
