"""Answers a task's requests, for the model as it is and for every candidate skipped, in one pass.

Answers come as one list a stream: the untouched model first, then each candidate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from layerpeel.architecture import attention_reach
from layerpeel.interrupts import stop_if_asked
from layerpeel.progress import Advance, progress
from layerpeel.stack import Budget, Stack, skipping_by_row
from layerpeel.tasks.base import Answer, Generation, Likelihood, LogLikelihood, Request, Task, TaskScore
from layerpeel.tasks.store import AnswerStore
from layerpeel.tasks.trees import Row, pad_rows, plant, single


class Engine:
    """Answers requests on one stack, all candidates at once, within a budget of memory.

    Args:
        candidates: positions to skip, ascending.
        budget: shared with whoever else works on the stack.
        store: answers that were given before, and a place for new ones.
    """

    def __init__(
        self,
        stack: Stack,
        tokenizer: PreTrainedTokenizerBase,
        candidates: Sequence[int] = (),
        *,
        budget: Budget | None = None,
        store: AnswerStore | None = None,
    ) -> None:
        self.stack, self.tokenizer, self.candidates = stack, tokenizer, candidates
        self.budget = budget or Budget(None, stack.device)
        self.store = store

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
        windows = [_windows(request, context_length(self.stack)) for request in requests]
        streams = []
        for answers in self._answer([window for own in windows for window in own], description):
            rest = iter(answers)
            streams.append([_joined([next(rest) for _ in own]) for own in windows])
        return streams

    def _answer(self, requests: Sequence[Request], description: str) -> list[list[Answer]]:
        state = PartialState(cpu=self.stack.device.type == "cpu")
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
            self.budget.shrink(error, self.stack, self.streams, max(map(len_of, requests)))

    def _answer_batch(self, requests: Sequence[Request]) -> list[list[Answer]]:
        """[requests][1 + C]; all of one kind."""
        found = self.store.find(requests, self.candidates) if self.store else None
        if found:
            return found
        if isinstance(requests[0], Generation):
            answers = self._generate([r for r in requests if isinstance(r, Generation)])
        else:
            answers = self._log_likelihoods([r for r in requests if isinstance(r, LogLikelihood)])
        if self.store:
            self.store.keep(requests, self.candidates, answers)
        return answers

    # Log-likelihoods

    @torch.no_grad()
    def _log_likelihoods(self, requests: Sequence[LogLikelihood]) -> list[list[Answer]]:
        limit = context_length(self.stack)
        sequences = [(r.context + r.continuation)[-(limit + 1) :] for r in requests]
        rows = list(self._rows([sequence[:-1] for sequence in sequences]))
        input_ids, positions, sees = pad_rows(rows)
        hidden = self.stack.walk(input_ids, self.candidates, positions=positions, sees=sees)
        asked = [
            (index, number * input_ids.shape[1] + path[place - 1], sequences[index][place])
            for number, row in enumerate(rows)
            for index, path in row.paths
            for place in range(len(sequences[index]) - len(requests[index].continuation), len(sequences[index]))
        ]
        asked.sort(key=lambda ask: ask[1])  # by node, so that each node goes through the head once
        owner, node, target = torch.tensor(asked).T if asked else torch.zeros(3, 0, dtype=torch.long)
        scored, best = self._token_scores(hidden.flatten(1, 2), node, target)
        sums = torch.zeros(self.streams, len(requests), dtype=torch.float64).index_add_(1, owner, scored)
        misses = torch.zeros(self.streams, len(requests)).index_add_(1, owner, (~best).float())
        columns = zip(sums.T.tolist(), (misses == 0).T.tolist(), strict=True)
        return [[Likelihood(*both) for both in zip(*own, strict=True)] for own in columns]

    def _token_scores(self, hidden: Tensor, node: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each target after its node, and whether it is the most probable token.

        Args:
            hidden: [S, B * T, D].
            node, target: [N], sorted by node.

        Returns:
            [S, N] of float64, and [S, N] of bool.
        """
        nodes, which = torch.unique_consecutive(node, return_inverse=True)
        rows = self.stack.logit_rows(self.streams)
        scores, bests = [], []
        for start in range(0, len(nodes), rows):
            here = (which >= start) & (which < start + rows)
            logits = self.stack.logits(hidden[:, nodes[start : start + rows].to(hidden.device)].flatten(0, 1)).float()
            logits = logits.unflatten(0, (self.streams, -1))
            column, token = (which[here] - start).to(logits.device), target[here].to(logits.device)
            own, top = logits[:, column, token], logits.amax(-1, keepdim=True)
            total = logits.sub_(top).exp_().sum(-1).log_() + top[..., 0]  # log-sum-exp, in place
            scores.append((own - total[:, column]).double().cpu())
            bests.append((own == top[:, column, 0]).cpu())
        empty = torch.zeros(self.streams, 0)
        return torch.cat([empty.double(), *scores], dim=1), torch.cat([empty.bool(), *bests], dim=1)

    def _rows(self, sequences: Sequence[Sequence[int]]) -> Iterator[Row]:
        """Trees, where the model runs them and the layers see far enough back; else one sequence a row."""
        longest, reach = max(map(len, sequences)), attention_reach(self.stack.model.config)
        if (reach is None or longest <= reach) and len(sequences) > 1 and self.stack.runs_trees:
            return plant(sequences, max(longest, self._row_width))
        return single(sequences)

    @property
    def _row_width(self) -> int:
        """Up to the hidden size, attention costs a small part of what else a layer does, also where it is slow."""
        return self.stack.width

    # Generation

    @torch.no_grad()
    def _generate(self, requests: Sequence[Generation]) -> list[list[Answer]]:
        """Greedy text for each prompt, all streams in one decode loop with the model's own cache."""
        stops = requests[0].stop
        limit = max(r.max_new_tokens for r in requests)
        prompts = [r.prompt[-max(1, context_length(self.stack) - limit) :] for r in requests]
        width, streams = max(map(len, prompts)), self.streams
        input_ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for index, prompt in enumerate(prompts):
            input_ids[index, width - len(prompt) :] = torch.tensor(prompt)
            mask[index, width - len(prompt) :] = 1
        ends = _end_tokens(self.tokenizer, stops)
        config = GenerationConfig(
            do_sample=False, max_new_tokens=limit, eos_token_id=ends, pad_token_id=ends[0], use_cache=True
        )
        with skipping_by_row(self.stack, self.candidates, len(prompts)):
            output = self.stack.model.generate(
                input_ids.repeat(streams, 1).to(self.stack.device),
                attention_mask=mask.repeat(streams, 1).to(self.stack.device),
                generation_config=config,
            )
        new = output[:, width:].unflatten(0, (streams, len(prompts))).tolist()
        return [
            [_text(self.tokenizer, new[stream][index][: r.max_new_tokens], r.stop) for stream in range(streams)]
            for index, r in enumerate(requests)
        ]

    # What goes together

    def _batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indices of requests that go together: of one kind, within the budget.

        In trees, log-likelihoods go by their tokens, so that shared beginnings meet; all else goes longest first, so
        that rows are of like length.
        """
        budget = self.budget.tokens(self.stack, self.streams)
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
        if isinstance(request, LogLikelihood) and self.stack.runs_trees:
            return request.context + request.continuation
        return (-len_of(request),)


def score_tasks(engine: Engine, tasks: Sequence[Task]) -> list[dict[str, TaskScore]]:
    """Scores each task on each stream.

    Returns:
        1 + C dicts from task name to score.
    """
    streams: list[dict[str, TaskScore]] = [{} for _ in range(engine.streams)]
    for task in tasks:
        samples = task.requests(engine.tokenizer)
        for stream, own in zip(streams, answer_samples(engine, dict(enumerate(samples)), task.name), strict=True):
            stream[task.name] = task.score(own)
    return streams


def answer_samples(
    engine: Engine, samples: dict[int, list[Request]], description: str
) -> list[dict[int, list[Answer]]]:
    """The answers to each sample's requests, on each stream."""
    flat = engine.answer([request for own in samples.values() for request in own], description)
    streams: list[dict[int, list[Answer]]] = []
    for answers in flat:
        rest = iter(answers)
        streams.append({sample: [next(rest) for _ in own] for sample, own in samples.items()})
    return streams


def len_of(request: Request) -> int:
    """Tokens that a request takes, at most."""
    if isinstance(request, Generation):
        return len(request.prompt) + request.max_new_tokens
    return len(request.context) + len(request.continuation)


def context_length(stack: Stack) -> int:
    """Tokens that the model was made for."""
    return getattr(stack.model.config, "max_position_embeddings", None) or 2048


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


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int], stops: Sequence[str]) -> str:
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id)]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text


_END_TOKENS: dict[tuple[int, int, tuple[str, ...]], list[int]] = {}


def _end_tokens(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> list[int]:
    """End of text, and every token that holds a stop: nothing after it would be read."""
    key = (id(tokenizer), len(tokenizer), tuple(stops))
    if key not in _END_TOKENS:
        texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
        held = [index for index, text in enumerate(texts) if any(stop in text for stop in stops)]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        _END_TOKENS[key] = list(dict.fromkeys(end + held)) or [0]
    return _END_TOKENS[key]
