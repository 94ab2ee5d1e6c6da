"""Answers requests for the model as it is and with each candidate skipped, in one pass.

Answers come as one list a branch: the untouched model first, then each candidate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice, takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedTokenizerBase

from layerpeel.inference.answer_cache import AnswerCache
from layerpeel.inference.batching import (
    batches_of,
    joined,
    kind_of,
    longest_first,
    share_of,
    shared_beginnings,
    windows_of,
)
from layerpeel.inference.budget import Budget
from layerpeel.inference.decoding import Decoder
from layerpeel.inference.finite import NotFiniteError, first_not_finite
from layerpeel.inference.generation_options import check_room, followed_options, generation_limit
from layerpeel.inference.kv_cache import PrefillCache, supports_prefill
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.likelihoods import log_likelihoods, window_length
from layerpeel.inference.requests import Answer, Generation, Likelihood, LogLikelihood, Request, fitted, len_of
from layerpeel.processes.distributed import gather, processes_of
from layerpeel.processes.interrupts import stop_if_asked
from layerpeel.processes.progress import Advance, progress


class Engine:
    """Answers requests with one model, all candidates at once, within a budget of memory.

    Args:
        candidates: positions to skip, ascending.
        budget: shared with whatever else runs the model.
        answer_cache: answers from before, and where to keep new ones.
        share_work: divide the requests among all processes, each of which has to call with the same ones; if not,
            this process answers all of them, and needs no other.
    """

    def __init__(
        self,
        layerwise: LayerwiseModel,
        tokenizer: PreTrainedTokenizerBase,
        candidates: Sequence[int] = (),
        *,
        budget: Budget | None = None,
        answer_cache: AnswerCache | None = None,
        share_work: bool = True,
    ) -> None:
        self.layerwise, self.tokenizer, self.candidates = layerwise, tokenizer, candidates
        self.budget = budget or Budget(None, layerwise.device)
        self.answer_cache, self.share_work = answer_cache, share_work
        self._drafts: dict[Generation, list[int]] = {}  # what the untouched model writes, while requests are answered

    @property
    def branches(self) -> int:
        """How many: 1 + C."""
        return 1 + len(self.candidates)

    @property
    def window(self) -> int:
        """Tokens that the model reads at a time; what is longer is cut, or read in parts."""
        return window_length(self.layerwise)

    def answer(self, requests: Sequence[Request], description: str = "answering") -> list[list[Answer]]:
        """Answers requests of both kinds, in their order.

        Args:
            description: of the progress bar.

        Returns:
            1 + C lists of answers.

        Raises:
            RunError: memory does not suffice for a single row.
            NotFiniteError: an answer is NaN or infinity; its `request` is the index of the request.
            InputError: a request cannot be answered with this model.
        """
        self._check_generations([r for r in requests if isinstance(r, Generation)], description)
        windows = [windows_of(fitted(request, self.window), self.window) for request in requests]
        owners = [index for index, parts in enumerate(windows) for _ in parts]
        try:
            answered = self._answer([window for parts in windows for window in parts], description)
        except NotFiniteError as error:
            error.request = None if error.request is None else owners[error.request]
            raise
        by_branch = []
        for answers in answered:
            rest = iter(answers)
            by_branch.append([joined([next(rest) for _ in parts]) for parts in windows])
        return by_branch

    def _check_generations(self, requests: Sequence[Generation], description: str) -> None:
        for request in {kind_of(request): request for request in requests}.values():
            check_room(request, self.window, description)
            followed_options(request, self.layerwise.model.generation_config, description)

    def _answer(self, requests: Sequence[Request], description: str) -> list[list[Answer]]:
        state = processes_of(self.layerwise.device) if self.share_work else None
        rank, world = (state.process_index, state.num_processes) if state else (0, 1)
        indices = share_of(requests, rank, world)
        answers: dict[int, list[Answer]] = {}
        with progress(description, len(indices)) as advance:
            while left := [index for index in indices if index not in answers]:
                self._answer_while_memory_lasts(requests, left, answers, advance)
        self._drafts.clear()
        if world > 1:
            for part in gather(answers):
                answers |= part
        return [[answers[index][branch] for index in range(len(requests))] for branch in range(self.branches)]

    def _answer_while_memory_lasts(
        self, requests: Sequence[Request], left: list[int], answers: dict[int, list[Answer]], advance: Advance
    ) -> None:
        try:
            batches = [[left[place] for place in b] for b in self._batches([requests[index] for index in left])]
            for number, indices in enumerate(batches):
                batch = [requests[index] for index in indices]
                later = (requests[index] for after in islice(batches, number + 1, None) for index in after)
                answers |= zip(indices, self._answer_batch(batch, later), strict=True)
                advance(len(batch))
                stop_if_asked()
        except NotFiniteError as error:
            error.request = None if error.request is None else indices[error.request]
            raise
        except Exception as error:
            self.budget.shrink(error, self.layerwise, self.branches, max(map(len_of, requests)))

    def _answer_batch(self, requests: Sequence[Request], later: Iterable[Request]) -> list[list[Answer]]:
        """[requests][1 + C]; all of one kind. `later` are those of the batches that follow."""
        if self.answer_cache is not None and (cached := self.answer_cache.find(requests, self.candidates)):
            return cached
        if isinstance(requests[0], Generation):
            alike = takewhile(lambda request: kind_of(request) == kind_of(requests[0]), later)
            answers = self._generate(
                [r for r in requests if isinstance(r, Generation)], (r for r in alike if isinstance(r, Generation))
            )
        else:
            answers = self._log_likelihoods([r for r in requests if isinstance(r, LogLikelihood)])
        if self.answer_cache is not None:
            self.answer_cache.keep(requests, self.candidates, answers)
        return answers

    def _log_likelihoods(self, requests: Sequence[LogLikelihood]) -> list[list[Answer]]:
        sums, agreed = log_likelihoods(self.layerwise, self.candidates, requests, self.budget)
        self._check_finite(sums, requests)
        greedy = agreed == torch.tensor([len(request.continuation) for request in requests])
        columns = zip(sums.T.tolist(), greedy.T.tolist(), strict=True)
        return [[Likelihood(*both) for both in zip(*column, strict=True)] for column in columns]

    def _check_finite(self, sums: Tensor, requests: Sequence[LogLikelihood]) -> None:
        """Checks log-probabilities, [1 + C, requests].

        Raises:
            NotFiniteError: it names the first that is NaN or infinity, and where the model first gives such.
        """
        wrong = (~torch.isfinite(sums)).nonzero().tolist()
        if not wrong:
            return
        # NaN reaches other texts of the same prefix tree, so the text is looked for that has it alone.
        branch, index = next(
            (pair for pair in wrong if not self._is_finite_alone(requests[pair[1]], pair[0])), wrong[0]
        )
        request, value = requests[index], f"a log-probability is {sums[branch, index]:g}"
        if branch:
            raise NotFiniteError(
                f"{value} with the layer at position {self.candidates[branch - 1]} skipped", request=index
            )
        place = first_not_finite(self.layerwise, (request.context + request.continuation)[: self.window])
        raise NotFiniteError(f"{value}; the model first gives NaN or infinity in {place}", request=index)

    def _is_finite_alone(self, request: LogLikelihood, branch: int) -> bool:
        candidates = self.candidates[branch - 1 : branch] if branch else ()
        sums, _ = log_likelihoods(self.layerwise, candidates, [request], self.budget)
        return bool(torch.isfinite(sums[-1]).all())

    def _generate(self, requests: Sequence[Generation], later: Iterable[Generation]) -> list[list[Answer]]:
        """Greedy text for each prompt, on all branches; all requests have the same stops and limit.

        The untouched model decodes first, and in the same loop for as many of the `later` requests as there is memory
        for on its one branch. One forward then runs its text on the branch of every candidate: as far as greedy
        decoding gives the same there, it is the candidate's text too. From the first token that differs, all
        candidates decode in one loop.
        """
        config = self.layerwise.model.generation_config
        options = followed_options(requests[0], config, "")
        limit = generation_limit(requests[0], config)
        decoder = Decoder(
            self.layerwise, self.tokenizer, requests[0].stop, limit, options, plain=requests[0].options is None
        )
        prompts = [request.prompt for request in requests]
        drafts = self._drafts_of(decoder, requests, later)
        texts = {(index, 0): tokens for index, tokens in enumerate(drafts)}
        if self.candidates:
            texts |= self._generate_skipping(decoder, prompts, drafts)
        branches = range(self.branches)
        return [[decoder.text(texts[index, branch]) for branch in branches] for index in range(len(prompts))]

    def _drafts_of(
        self, decoder: Decoder, requests: Sequence[Generation], later: Iterable[Generation]
    ) -> list[list[int]]:
        """The tokens that the untouched model writes after each prompt; those of `later` requests are kept for them."""
        missing = [index for index, request in enumerate(requests) if request not in self._drafts]
        if missing:
            room = self.budget.tokens(self.layerwise, 1) // max(map(len_of, requests)) - len(missing)
            more = [*islice((request for request in later if request not in self._drafts), max(room, 0))]
            needed = [requests[index] for index in missing]
            try:
                self._draft(decoder, needed + more)
            except NotFiniteError as error:
                if not more:
                    error.request = None if error.request is None else missing[error.request]
                    raise
                self._draft(decoder, needed)  # the batch of the one that fails will say so
        return [self._drafts[request] for request in requests]

    def _draft(self, decoder: Decoder, requests: Sequence[Generation]) -> None:
        try:
            drafts = decoder.decode([request.prompt for request in requests], [None] * len(requests))
        except NotFiniteError as error:
            place = first_not_finite(self.layerwise, error.tokens)
            what = f"{error}; the model first gives NaN or infinity in {place}"
            raise NotFiniteError(what, request=error.request) from None
        self._drafts |= zip(requests, drafts, strict=True)

    def _generate_skipping(
        self, decoder: Decoder, prompts: Sequence[tuple[int, ...]], drafts: Sequence[Sequence[int]]
    ) -> dict[tuple[int, int], list[int]]:
        """The tokens after each prompt with each candidate skipped, by the prompt's index and the branch.

        Args:
            drafts: of each prompt, the tokens that the untouched model decodes.
        """
        rows = [(index, branch) for index in range(len(prompts)) for branch in range(1, self.branches)]
        if decoder.options:  # the draft's tokens are not those of the highest logits
            return self._generate_rows(decoder, prompts, rows)
        requests = [LogLikelihood(prompt, tuple(draft)) for prompt, draft in zip(prompts, drafts, strict=True)]
        config = self.layerwise.model.config
        prefill = PrefillCache(self.candidates) if supports_prefill(config, len(self.layerwise.layers)) else None
        agreed = log_likelihoods(self.layerwise, self.candidates, requests, self.budget, prefill)[1].T.tolist()

        def cache_of(chosen: Sequence[int], lengths: Sequence[int]) -> Cache | None:
            indices, branches = zip(*(rows[row] for row in chosen), strict=True)
            return prefill.cache_of(indices, branches, lengths, config) if prefill else None

        agreed_drafts = [drafts[index][: agreed[index][branch]] for index, branch in rows]
        return self._generate_rows(decoder, prompts, rows, agreed_drafts, cache_of)

    def _generate_rows(
        self, decoder: Decoder, prompts: Sequence[tuple[int, ...]], rows: Sequence[tuple[int, int]], *decoded: Any
    ) -> dict[tuple[int, int], list[int]]:
        """The tokens of some rows, each a prompt's index and a branch.

        Args:
            decoded: the `drafts` and `cache_of` of `Decoder.decode`.
        """
        skipped = [self.candidates[branch - 1] for _, branch in rows]
        try:
            written = decoder.decode([prompts[index] for index, _ in rows], skipped, *decoded)
        except NotFiniteError as error:
            if error.request is None:
                raise
            what = f"{error} with the layer at position {skipped[error.request]} skipped"
            raise NotFiniteError(what, request=rows[error.request][0]) from None
        return dict(zip(rows, written, strict=True))

    def _batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indices of requests that go together, within the budget."""
        order = shared_beginnings if self._runs_trees(requests) else longest_first
        return batches_of(requests, self.budget.tokens(self.layerwise, self.branches), order)

    def _runs_trees(self, requests: Sequence[Request]) -> bool:
        return any(isinstance(request, LogLikelihood) for request in requests) and self.layerwise.runs_trees
