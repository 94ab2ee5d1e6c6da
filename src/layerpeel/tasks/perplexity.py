"""Perplexity on text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, PrivateAttr
from transformers import PreTrainedTokenizerBase

from layerpeel.data.reading import text_of
from layerpeel.errors import InputError
from layerpeel.inference.encoding import start_token
from layerpeel.inference.requests import LogLikelihood, Request
from layerpeel.tasks.base import RowTask
from layerpeel.tasks.scores import TaskScore


class Perplexity(RowTask):
    """exp(mean negative log-likelihood of a token), over documents cut into windows; lower is better."""

    split: str = "train"
    column: str = "text"
    """The column that holds the text."""
    sequence_length: Annotated[int, Field(ge=2)] = 256
    """Tokens in a window; each window starts afresh from the beginning-of-text token."""

    _tokens: list[int] = PrivateAttr(default_factory=list)  # of each document

    def check(self) -> None:
        if not any(text_of(row, self.column, self.where).strip() for row in self.rows):
            raise InputError(f"{self.where}: column '{self.column}' holds no text", hint="give rows with text in them")

    def requests(self, tokenizer: PreTrainedTokenizerBase) -> list[list[Request]]:
        size, start = self.sequence_length, (start_token(tokenizer),)
        documents = [
            tuple(tokenizer.encode(text_of(row, self.column, self.where), add_special_tokens=False))
            for row in self.rows
        ]
        self._tokens = [len(ids) for ids in documents]
        return [[LogLikelihood(start, ids[at : at + size]) for at in range(0, len(ids), size)] for ids in documents]

    def score(self, answers: Mapping[int, Sequence[Any]]) -> TaskScore:
        """A sample is a document, weighted by its tokens."""
        tokens = [self._tokens[index] for index in answers]
        losses = [-math.fsum(answer.log_probability for answer in own) for own in answers.values()]
        mean = TaskScore.of_mean([loss / max(n, 1) for loss, n in zip(losses, tokens, strict=True)], tokens)
        value = math.exp(min(mean.value, 700.0))
        return TaskScore(
            value,
            value * mean.stderr,
            mean.n,
            lower_is_better=True,
            influences=tuple(value * influence for influence in mean.influences or ()),
        )
