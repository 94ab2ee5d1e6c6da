"""Minimal pairs: is the good sentence more probable than the bad one (BLiMP, arXiv 1912.00582)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from layerpeel.data import text_of
from layerpeel.tasks.base import LogLikelihood, Request, Task, TaskScore, encode_pair


class Pairs(Task):
    """Share of pairs in which the good sentence has the higher log-probability."""

    good: str = "sentence_good"
    """The column of the good sentence."""
    bad: str = "sentence_bad"
    """The column of the bad one."""

    def check(self) -> None:
        for row in self.rows:
            self._pair(row)

    def requests(self, tokenizer: PreTrainedTokenizerBase) -> list[Request]:
        return [LogLikelihood(*encode_pair(tokenizer, "", text)) for row in self.rows for text in self._pair(row)]

    def score(self, answers: Sequence[Any]) -> TaskScore:
        return TaskScore.of_mean([float(g > b) for g, b in zip(answers[::2], answers[1::2], strict=True)])

    def _pair(self, row: dict[str, Any]) -> tuple[str, str]:
        return text_of(row, self.good, self.where), text_of(row, self.bad, self.where)
