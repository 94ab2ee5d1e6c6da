"""Minimal pairs: is the good sentence more probable than the bad one (BLiMP, arXiv 1912.00582)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from layerpeel.data.cells import TableRow, located, text_of
from layerpeel.errors import InputError
from layerpeel.inference.encoding import encode_pair
from layerpeel.inference.requests import LogLikelihood
from layerpeel.tasks.base import RowTask, Sample
from layerpeel.tasks.scores import TaskScore


class Pairs(RowTask):
    """Share of pairs in which the good sentence has the higher log-probability."""

    good: str = "sentence_good"
    """The column of the good sentence."""
    bad: str = "sentence_bad"
    """The column of the bad one."""

    def check(self) -> None:
        for row in self.rows:
            self._pair(row)

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        return [self._sample(row, tokenizer) for row in self.rows]

    def score(self, samples: Sequence[Sample], answers: Sequence[Sequence[Any]]) -> TaskScore:
        correct = [float(good.log_probability > bad.log_probability) for good, bad in answers]
        return TaskScore.of_mean(correct, chance=0.5)

    def _sample(self, row: TableRow, tokenizer: PreTrainedTokenizerBase) -> Sample:
        requests = [LogLikelihood(*encode_pair(tokenizer, "", text)) for text in self._pair(row)]
        for request, column in zip(requests, (self.good, self.bad), strict=True):
            if not request.continuation:
                raise InputError(
                    f"{located(row, self.where)}: column '{column}' holds a sentence without a token, which is as "
                    "probable as can be",
                    hint="leave such rows out",
                )
        return Sample(requests, place=located(row, self.data))

    def _pair(self, row: TableRow) -> tuple[str, str]:
        return text_of(row, self.good, self.where), text_of(row, self.bad, self.where)
