"""What a task is: requests that a model answers, and a score of the answers."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedTokenizerBase

from layerpeel.data import column_of, expand, read_rows
from layerpeel.errors import InputError


@dataclass(frozen=True)
class LogLikelihood:
    """The log-probability of `continuation` after `context`, which is never empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Generation:
    """Greedy text after `prompt`, cut at the first of `stop`."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...]


Request = LogLikelihood | Generation
Row = dict[str, Any]


class Likelihood(NamedTuple):
    """The answer to a `LogLikelihood`: summed natural log-probability, and whether greedy decoding gives the same."""

    log_probability: float
    greedy: bool


Answer = Likelihood | str


@dataclass(frozen=True)
class TaskScore:
    """A task's score: its value as people read it, its standard error, and the number of samples.

    Attributes:
        influences: what each sample adds to the value beyond its share of the mean (to first order), [n]; the paired
            error of a difference is that of the differences of these. None where samples can't be told apart.
        chance: what guessing would score, where that is known.
    """

    value: float
    stderr: float
    n: int
    lower_is_better: bool = False
    influences: tuple[float, ...] | None = field(default=None, repr=False, compare=False)
    chance: float | None = None

    @classmethod
    def of_mean(
        cls, samples: Sequence[float], weights: Sequence[float] | None = None, *, chance: float | None = None
    ) -> TaskScore:
        """The (weighted) mean, with the standard error of the sample (n - 1); of a ratio, by the delta method."""
        n = len(samples)
        weights = weights or [1.0] * n
        total = math.fsum(weights) or 1.0  # documents without a token weigh nothing
        mean = math.fsum(w * sample for w, sample in zip(weights, samples, strict=True)) / total
        influences = tuple(n * w * (sample - mean) / total for w, sample in zip(weights, samples, strict=True))
        return cls(mean, _stderr_of(influences), n, influences=influences, chance=chance)

    def to_json(self) -> dict[str, Any]:
        own = {"value": self.value, "stderr": self.stderr, "n": self.n, "lower_is_better": self.lower_is_better}
        return own if self.chance is None else own | {"chance": self.chance}


def _stderr_of(influences: Sequence[float]) -> float:
    n = len(influences)
    return math.sqrt(math.fsum(value**2 for value in influences) / max(n - 1, 1) / n)


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model on all tasks."""

    scores: dict[str, TaskScore]

    def qualities(self, reference: Evaluation) -> dict[str, float]:
        """Each task's score as higher-is-better: perplexity enters as the reference's divided by one's own."""
        return {
            name: reference.scores[name].value / score.value if score.lower_is_better else score.value
            for name, score in self.scores.items()
        }

    def aggregate(self, reference: Evaluation, how: str = "mean") -> float:
        """One number: the mean of the qualities (the paper's), or of quality / the reference's (`relative`)."""
        own, theirs = self.qualities(reference), reference.qualities(reference)
        if how == "relative":
            own = {name: value / theirs[name] if theirs[name] else 1.0 for name, value in own.items()}
        return sum(own.values()) / len(own)

    def difference_stderr(
        self, other: Evaluation, reference: Evaluation, how: str = "mean", seen: Mapping[str, float] | None = None
    ) -> float:
        """The standard error of the difference between two models' aggregates, paired sample by sample.

        Args:
            reference: the teacher's evaluation, taken as exact.
            seen: the share of each task's samples that the scores are of, if not all are: what is left to draw is
                then finite, and the error of the whole shrinks to 0 as the share goes to 1.
        """
        variances = self.difference_variances(other, reference, how)
        left = [variance * (1 - seen[name] if seen else 1) for name, variance in variances.items()]
        return math.sqrt(math.fsum(left)) / len(left)

    def difference_variances(self, other: Evaluation, reference: Evaluation, how: str = "mean") -> dict[str, float]:
        """By task, the variance of the difference between two models' qualities, paired where samples can be."""
        variances = {}
        for name in self.scores:
            own, theirs = (e._quality_influences(name, reference, how) for e in (self, other))
            if own is not None and theirs is not None:
                variances[name] = _stderr_of([a - b for a, b in zip(own, theirs, strict=True)]) ** 2
            else:
                variances[name] = sum(
                    (e.scores[name].stderr * e._quality_slope(name, reference, how)) ** 2 for e in (self, other)
                )
        return variances

    def _quality_influences(self, name: str, reference: Evaluation, how: str) -> list[float] | None:
        influences = self.scores[name].influences
        slope = self._quality_slope(name, reference, how)
        return None if influences is None else [slope * value for value in influences]

    def _quality_slope(self, name: str, reference: Evaluation, how: str) -> float:
        """How the task's part of the aggregate changes with its value."""
        own, theirs = self.scores[name], reference.scores[name].value
        slope = -theirs / own.value**2 if own.lower_is_better else 1.0
        whole = 1.0 if own.lower_is_better else theirs  # the reference's quality
        return slope / whole if how == "relative" and whole else slope

    def to_json(self) -> dict[str, Any]:
        return {name: score.to_json() for name, score in self.scores.items()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Evaluation:
        return cls({name: TaskScore(**score) for name, score in value.items()})


class Task(BaseModel, ABC):
    """A measurement of quality; its fields are its options in the config."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    name: str
    kind: str
    limit: Annotated[int, Field(ge=1)] | None = None
    """Take only the first rows (of each file, where several are named)."""

    @abstractmethod
    def requests(self, tokenizer: PreTrainedTokenizerBase) -> list[list[Request]]:
        """What the model is asked for each sample."""

    @abstractmethod
    def score(self, answers: Mapping[int, Sequence[Any]]) -> TaskScore:
        """The score over some samples (or all).

        Args:
            answers: by sample, in ascending order, the answers to its `requests`, in their order.
        """

    @abstractmethod
    def check(self) -> None:
        """Reads the data and checks that it has what the task needs.

        Raises:
            InputError: it has not.
        """


class RowTask(Task):
    """A task over the rows of a dataset, each of them a sample."""

    data: str
    """A .jsonl, .json, .csv or .parquet file, a glob, a saved dataset or a hub name."""
    subset: str | None = None
    """Of a hub dataset."""
    split: str = "test"
    """Where there are splits."""

    @cached_property
    def rows(self) -> list[Row]:
        """The rows to test on.

        Raises:
            InputError: there are none, or they cannot be read.
        """
        rows: list[Row] = []
        for path in self._expand():
            rows += islice(filter(self._is_asked, self._read(path, split=self.split)), self.limit)
        if not rows:
            raise InputError(f"task {self.name}: {self.data} holds no rows", hint="give data with at least one row")
        return rows

    def _is_asked(self, row: Row) -> bool:
        return True

    def _expand(self) -> list[str]:
        try:
            return expand(self.data)
        except InputError as error:
            raise InputError(f"task {self.name}: {error}", hint=error.hint) from None

    def _read(self, path: str, *, split: str) -> Iterator[Row]:
        try:
            yield from read_rows(path, split=split, name=self.subset)
        except InputError as error:
            raise InputError(f"task {self.name}: {error}", hint=error.hint) from None

    @property
    def where(self) -> str:
        return f"task {self.name}: {self.data}"


class FewShot(RowTask):
    """A task that can show solved rows before the one asked; no row is both shown and asked."""

    num_fewshot: Annotated[int, Field(ge=0)] = 0
    """How many solved rows to show."""
    fewshot_data: str | None = None
    """Where they are from: its first rows. `data` if not given."""
    fewshot_split: str | None = None
    """Its split, where there are splits. With neither of the two given, the last rows of `data` are shown."""
    fewshot_separator: str = "\n\n"
    """Between them."""

    @cached_property
    def shown(self) -> list[Row]:
        """The solved rows.

        Raises:
            InputError: there are too few, or they cannot be read.
        """
        if not self.num_fewshot:
            return []
        source = self.fewshot_data or self.data
        apart = self.fewshot_data is not None or self.fewshot_split is not None
        rows = self._read(source, split=self.fewshot_split or self.split)
        shown = list(islice(rows, self.num_fewshot)) if apart else list(deque(rows, maxlen=self.num_fewshot))
        if len(shown) < self.num_fewshot:
            raise InputError(
                f"task {self.name}: {source} holds {len(shown)} rows, too few to show {self.num_fewshot}",
                hint="lower num_fewshot, or name other rows (fewshot_data, fewshot_split)",
            )
        return shown

    def fewshot_prefix(self, solved: Callable[[Row], str]) -> str:
        """The rows shown, solved, each followed by the separator."""
        return "".join(solved(row) + self.fewshot_separator for row in self.shown)

    def _is_asked(self, row: Row) -> bool:
        return row not in self.shown


PLACEHOLDER = re.compile(r"\{(\w+)((?:\[\w+\])*)(\.\w[^{}]*)?\}")


def fill(template: str, row: Row, where: str) -> str:
    """A template over a row's columns: `{question}`, `{choices[0]}`, `{choices[text][0]}`; all else stands for itself.

    Raises:
        InputError: a column is absent (those present are named), or an attribute is asked for.
    """

    def value(match: re.Match[str]) -> str:
        if match[3]:
            raise InputError(
                f"{where}: the template has '{match[0]}', but templates read columns and entries, not attributes",
                hint="as in {question} or {choices[0]}",
            )
        found = column_of(row, match[1], where)
        for key in re.findall(r"\w+", match[2]):
            try:
                found = found[int(key) if isinstance(found, (list, tuple)) else key]
            except (KeyError, IndexError, TypeError, ValueError):
                raise InputError(
                    f"{where}: column '{match[1]}' has no '{key}'", hint=f"it holds {str(found)[:80]!r}"
                ) from None
        if found is None or isinstance(found, list | dict):
            raise InputError(
                f"{where}: '{match[0]}' is {str(found)[:60]!r}, expected text or a number",
                hint="leave such rows out, or name an entry of it, as in {choices[0]}",
            )
        return str(found)

    return PLACEHOLDER.sub(value, template)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, with the special tokens that the tokenizer adds, unless it begins with the first of them."""
    begun = text.startswith(tokenizer.decode([start_token(tokenizer)]))
    return tokenizer.encode(text, add_special_tokens=not begun)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of a context and of its continuation, split as lm-evaluation-harness does.

    Spaces that end the context go to the continuation, whose tokens are those of the whole after as many as the
    context has alone. An empty context (or one of spaces) becomes the tokenizer's beginning (or end) of text, unless
    the continuation begins with that.
    """
    kept = context.rstrip()
    if not kept:
        start = start_token(tokenizer)
        ids = tuple(tokenizer.encode(context + continuation, add_special_tokens=False))
        return (start,), ids[1:] if ids[:1] == (start,) else ids
    context, continuation = kept, context[len(kept) :] + continuation
    head = encode(tokenizer, context)
    return tuple(head), tuple(encode(tokenizer, context + continuation)[len(head) :])


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What stands before the first token of a text."""
    return next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
