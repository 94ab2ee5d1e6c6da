"""Multiple choice: the choice with the highest log-probability after the context (as lm-evaluation-harness's `acc`)."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr
from transformers import PreTrainedTokenizerBase

from layerpeel.data.reading import column_of
from layerpeel.errors import InputError
from layerpeel.inference.encoding import encode_pair
from layerpeel.inference.requests import LogLikelihood, Request
from layerpeel.tasks.base import FewShot, Row
from layerpeel.tasks.scores import TaskScore
from layerpeel.tasks.templates import fill


class Choice(FewShot):
    """Accuracy over rows with several choices, of which one is right."""

    prompt: str = "{context}"
    """A template over the row's columns."""
    choices: str | Annotated[list[str], Field(min_length=2)] = "choices"
    """The column that holds the list of choices, or a list of templates."""
    answer: str = "answer"
    """The column that holds the right one: its index, its letter (A, B, ...), or its text."""
    delimiter: str = " "
    """Between prompt and choice."""
    normalize: Literal["none", "bytes", "tokens"] = "none"
    """Divide each log-probability by the choice's length, so that long ones stand a chance."""

    _lengths: list[list[int]] = PrivateAttr(default_factory=list)  # of each row's choices, by which to divide

    def check(self) -> None:
        self._prefix()
        for row in self.rows:
            fill(self.prompt, row, self.where)
            self._right(row)

    def requests(self, tokenizer: PreTrainedTokenizerBase) -> list[list[Request]]:
        prefix = self._prefix()
        self._lengths = []
        requests: list[list[Request]] = []
        for row in self.rows:
            context = prefix + fill(self.prompt, row, self.where)
            choices = self._choices(row)
            own = [LogLikelihood(*encode_pair(tokenizer, context, self.delimiter + choice)) for choice in choices]
            for request, choice in zip(own, choices, strict=True):
                if not request.continuation:
                    raise InputError(
                        f"{self.where}: choice {choice!r} has no token of its own after its prompt",
                        hint="let the delimiter hold a space or a line break",
                    )
            requests.append([*own])
            sizes = {
                "none": [1] * len(own),
                "bytes": [max(1, len(choice.encode())) for choice in choices],
                "tokens": [len(request.continuation) for request in own],
            }
            self._lengths.append(sizes[self.normalize])
        return requests

    def score(self, answers: Mapping[int, Sequence[Any]]) -> TaskScore:
        correct = []
        for index, own in answers.items():
            values = [a.log_probability / n for a, n in zip(own, self._lengths[index], strict=True)]
            correct.append(float(values.index(max(values)) == self._right(self.rows[index])))
        chance = math.fsum(1 / len(self._lengths[index]) for index in answers) / len(answers)
        return TaskScore.of_mean(correct, chance=chance)

    def _prefix(self) -> str:
        return self.fewshot_prefix(
            lambda row: fill(self.prompt, row, self.where) + self.delimiter + self._choices(row)[self._right(row)]
        )

    def _choices(self, row: Row) -> list[str]:
        if isinstance(self.choices, list):
            return [fill(template, row, self.where) for template in self.choices]
        found = column_of(row, self.choices, self.where)
        if not isinstance(found, list) or len(found) < 2:
            raise InputError(
                f"{self.where}: column '{self.choices}' holds {str(found)[:60]!r}, expected a list of choices",
                hint="name a column with a list, or give a list of templates (choices: ['{a}', '{b}'])",
            )
        odd = next((choice for choice in found if not isinstance(choice, str | int | float)), "")
        if odd != "":
            raise InputError(
                f"{self.where}: column '{self.choices}' holds a choice of {str(odd)[:60]!r}, expected text",
                hint="each choice is a text or a number",
            )
        return [str(choice) for choice in found]

    def _right(self, row: Row) -> int:
        choices, answer = self._choices(row), column_of(row, self.answer, self.where)
        if isinstance(answer, str):
            letters = [chr(ord("A") + index) for index in range(len(choices))]
            options = choices if answer in choices else letters
            answer = options.index(answer) if answer in options else answer
        if isinstance(answer, str) and re.fullmatch("[0-9]{1,9}", answer):
            answer = int(answer)
        if not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise InputError(
                f"{self.where}: column '{self.answer}' holds {reprlib.repr(answer)}, expected which of the "
                f"{len(choices)} choices is right",
                hint="an index from 0, a letter from A, or the text of the choice",
            )
        return answer
