"""Perplexity on text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, PrivateAttr
from transformers import PreTrainedTokenizerBase

from layerpeel.data import text_of
from layerpeel.errors import InputError
from layerpeel.tasks.base import LogLikelihood, Request, Task, TaskScore, start_token


class Perplexity(Task):
    """exp(mean negative log-likelihood of a token), over documents cut into windows; lower is better."""

    split: str = "train"
    column: str = "text"
    """The column that holds the text."""
    sequence_length: Annotated[int, Field(ge=2)] = 256
    """Tokens in a window; each window starts afresh from the beginning-of-text token."""

    _tokens: list[tuple[int, int]] = PrivateAttr(default_factory=list)  # of each window: document, length

    def check(self) -> None:
        if not any(text_of(row, self.column, self.where).strip() for row in self.rows):
            raise InputError(f"{self.where}: column '{self.column}' holds no text", hint="give rows with text in them")

    def requests(self, tokenizer: PreTrainedTokenizerBase) -> list[Request]:
        self._tokens = []
        requests: list[Request] = []
        for document, row in enumerate(self.rows):
            ids = tokenizer.encode(text_of(row, self.column, self.where), add_special_tokens=False)
            for start in range(0, len(ids), self.sequence_length):
                window = tuple(ids[start : start + self.sequence_length])
                requests.append(LogLikelihood((start_token(tokenizer),), window))
                self._tokens.append((document, len(window)))
        return requests

    def score(self, answers: Sequence[Any]) -> TaskScore:
        """The standard error is that of the ratio (loss a document / tokens a document), by the delta method."""
        losses = [0.0] * len(self.rows)
        tokens = [0] * len(self.rows)
        for (document, length), answer in zip(self._tokens, answers, strict=True):
            losses[document] -= answer
            tokens[document] += length
        n, mean = len(self.rows), sum(losses) / sum(tokens)
        spread = sum((loss - mean * count) ** 2 for loss, count in zip(losses, tokens, strict=True)) / max(n - 1, 1)
        value = math.exp(min(mean, 700.0))
        return TaskScore(value, value * math.sqrt(spread / n) / (sum(tokens) / n), n, lower_is_better=True)
