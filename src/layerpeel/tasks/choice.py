"""Multiple choice: the choice with the highest log-probability after the context (as lm-evaluation-harness's `acc`)."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from layerpeel.data.cells import TableRow, column_of, located, text_form
from layerpeel.errors import InputError
from layerpeel.inference.encoding import encode_pair
from layerpeel.inference.requests import LogLikelihood
from layerpeel.tasks.answer_reading import AnswerReading
from layerpeel.tasks.base import FewShot, Sample
from layerpeel.tasks.scores import TaskScore
from layerpeel.tasks.templates import fill


class _Key(NamedTuple):
    """The index of the right choice, and by what each choice's log-probability is divided."""

    right: int
    lengths: Sequence[int]


class Choice(FewShot):
    """Accuracy over rows with several choices, of which one is right."""

    prompt: str = "{context}"
    """A template over the row's columns."""
    choices: str | Annotated[list[str], Field(min_length=2)] = "choices"
    """The column that holds the list of choices, or a list of templates."""
    answer: str = "answer"
    """The column that holds the right one: its index from 0, its letter (A, B, ...), or its text; all rows alike. Where
    some rows have letters, numbers in others count from 1."""
    delimiter: str = " "
    """Between prompt and choice."""
    normalize: Literal["none", "bytes", "tokens"] = "none"
    """Divide each log-probability by the choice's length, so that long ones stand a chance."""

    def check(self) -> None:
        self._prefix()
        for row in self.rows:
            fill(self.prompt, row, self.where)
            self._right(row)

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        prefix = self._prefix()
        return [self._sample(row, prefix, tokenizer) for row in self.rows]

    def score(self, samples: Sequence[Sample], answers: Sequence[Sequence[Any]]) -> TaskScore:
        keys: list[_Key] = [sample.reference for sample in samples]
        correct = []
        for key, likelihoods in zip(keys, answers, strict=True):
            values = [a.log_probability / length for a, length in zip(likelihoods, key.lengths, strict=True)]
            correct.append(float(values.index(max(values)) == key.right))
        chance = math.fsum(1 / len(key.lengths) for key in keys) / len(keys)
        return TaskScore.of_mean(correct, chance=chance)

    def _sample(self, row: TableRow, prefix: str, tokenizer: PreTrainedTokenizerBase) -> Sample:
        context, choices = prefix + fill(self.prompt, row, self.where), self._choices(row)
        requests = [LogLikelihood(*encode_pair(tokenizer, context, self.delimiter + choice)) for choice in choices]
        for request, choice in zip(requests, choices, strict=True):
            if not choice.strip() or not request.continuation:
                raise InputError(
                    f"{located(row, self.where)}: choice {choice!r} has no token of its own after its prompt",
                    hint="leave empty choices out; else let the delimiter hold a space or a line break",
                )
        lengths = {
            "none": [1] * len(choices),
            "bytes": [max(1, len(choice.encode())) for choice in choices],
            "tokens": [len(request.continuation) for request in requests],
        }
        right = choices.index(choices[self._right(row)])  # of equal choices, `score` takes the first
        return Sample(requests, _Key(right, lengths[self.normalize]), located(row, self.data))

    def _prefix(self) -> str:
        return self.fewshot_prefix(
            lambda row: fill(self.prompt, row, self.where) + self.delimiter + self._choices(row)[self._right(row)]
        )

    def _choices(self, row: TableRow) -> list[str]:
        if isinstance(self.choices, list):
            return [fill(template, row, self.where) for template in self.choices]
        choices, where = column_of(row, self.choices, self.where), located(row, self.where)
        if not isinstance(choices, list) or len(choices) < 2:
            raise InputError(
                f"{where}: column '{self.choices}' holds {str(choices)[:60]!r}, expected a list of choices",
                hint="name a column with a list, or give a list of templates (choices: ['{a}', '{b}'])",
            )
        texts = [text for text in map(text_form, choices) if text is not None]
        if len(texts) < len(choices):
            odd = next(choice for choice in choices if text_form(choice) is None)
            raise InputError(
                f"{where}: column '{self.choices}' holds a choice of {str(odd)[:60]!r}, expected text",
                hint="each choice is a text or a number",
            )
        return texts

    def _right(self, row: TableRow) -> int:
        """The index of the right choice, by the rule that holds for the whole column."""
        right = self._reading.read(self._choices(row), column_of(row, self.answer, self.where))
        if right is None:
            answer = reprlib.repr(column_of(row, self.answer, self.where))
            raise InputError(
                f"{located(row, self.where)}: column '{self.answer}' holds {answer}, expected which of the "
                f"{len(self._choices(row))} choices is right{self._reading.note}",
                hint="an index from 0, a letter from A, or the text of the choice, the same for all rows",
            )
        return right

    @cached_property
    def _reading(self) -> AnswerReading:
        rows = [*self.rows, *self.shown]
        return AnswerReading.of([(self._choices(row), column_of(row, self.answer, self.where)) for row in rows])
