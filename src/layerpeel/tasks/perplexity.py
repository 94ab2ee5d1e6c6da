"""Perplexity on text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from layerpeel.config.fields import AS_COUNT
from layerpeel.data.cells import located, text_of
from layerpeel.data.tokenizing import start_tokens
from layerpeel.errors import InputError
from layerpeel.inference.encoding import start_token
from layerpeel.inference.requests import LogLikelihood
from layerpeel.tasks.base import RowTask, Sample
from layerpeel.tasks.scores import TaskScore


class Perplexity(RowTask):
    """exp(mean negative log-likelihood of a token), over documents cut into windows; lower is better."""

    split: str = "train"
    column: str = "text"
    """The column that holds the text."""
    sequence_length: Annotated[int, Field(ge=2), AS_COUNT] = 256
    """Tokens in a window; each window starts afresh, from the tokens that the tokenizer sets before a text, or else
    from the token of its beginning."""

    def check(self) -> None:
        if not any(text_of(row, self.column, self.where).strip() for row in self.rows):
            raise InputError(f"{self.where}: column '{self.column}' holds no text", hint="give rows with text in them")

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        """One sample a document; its reference is the number of its tokens."""
        size, start = self.sequence_length, tuple(start_tokens(tokenizer)) or (start_token(tokenizer),)
        samples = []
        for row in self.rows:
            text = text_of(row, self.column, self.where)
            ids = tuple(tokenizer.encode(text, add_special_tokens=False))
            ids = ids[len(start) :] if ids[: len(start)] == start else ids  # a chat template has set it
            windows = [LogLikelihood(start, ids[at : at + size]) for at in range(0, len(ids), size)]
            samples.append(Sample(windows, len(ids), located(row, self.data)))
        if not any(sample.requests for sample in samples):
            raise InputError(
                f"{self.where}: column '{self.column}' holds no text but special tokens",
                hint="give rows with text in them",
            )
        return samples

    def score(self, samples: Sequence[Sample], answers: Sequence[Sequence[Any]]) -> TaskScore:
        tokens: list[int] = [sample.reference for sample in samples]
        losses = [-math.fsum(window.log_probability for window in windows) for windows in answers]
        mean = TaskScore.of_mean([loss / max(n, 1) for loss, n in zip(losses, tokens, strict=True)], tokens)
        value = math.exp(min(mean.value, 700.0))
        return TaskScore(
            value,
            value * mean.stderr,
            mean.n,
            lower_is_better=True,
            influences=tuple(value * influence for influence in mean.influences or ()),
        )
