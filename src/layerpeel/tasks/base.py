"""What a task is: samples with requests that a model answers, and a score of the answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedTokenizerBase

from layerpeel.config.fields import AS_COUNT
from layerpeel.data.cells import TableRow
from layerpeel.data.digests import digest_of_rows
from layerpeel.data.reading import expand, read_rows
from layerpeel.errors import InputError
from layerpeel.inference.requests import Request
from layerpeel.tasks.scores import TaskScore


@dataclass(frozen=True)
class Sample:
    """One item of a task.

    Attributes:
        requests: what the model is asked, in this order.
        reference: whatever the task's `score` compares the answers with; nothing else reads it.
        place: where it is from, as in `data.jsonl, line 3`, for messages.
    """

    requests: Sequence[Request]
    reference: Any = None
    place: str = ""


class Task(BaseModel, ABC):
    """A measurement of quality; its fields are its options in the config, and all that it keeps."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    name: str
    kind: str
    limit: Annotated[int, Field(ge=1), AS_COUNT] | None = None
    """Take only the first rows (of each file, where several are named)."""

    @abstractmethod
    def samples(self, tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
        """The samples, each with what the model is asked and what its answers are compared with.

        Raises:
            InputError: the data or the tokenizer will not do.
        """

    @abstractmethod
    def score(self, samples: Sequence[Sample], answers: Sequence[Sequence[Any]]) -> TaskScore:
        """The score over some of the samples (or all).

        Args:
            samples: of `samples`, in their order.
            answers: of each sample, the answers to its requests.
        """

    @abstractmethod
    def check(self) -> None:
        """Reads the data and checks that it has what the task needs.

        Raises:
            InputError: it has not.
        """

    def digest(self) -> str | None:
        """Of the rows that the task reads, wherever they are; None if it cannot tell."""
        return None

    def requests(self, tokenizer: PreTrainedTokenizerBase) -> list[Request]:
        """The requests of all samples, one sample's after another's."""
        return [request for sample in self.samples(tokenizer) for request in sample.requests]


class RowTask(Task):
    """A task over the rows of a dataset, one sample a row."""

    data: str
    """A .jsonl, .json, .csv, .tsv, .parquet or .arrow file, a glob, a saved dataset or a hub name; a .txt file too, for
    perplexity."""
    subset: str | None = None
    """Of a hub dataset."""
    split: str = "test"
    """Where there are splits."""

    @cached_property
    def rows(self) -> list[TableRow]:
        """The rows to test on.

        Raises:
            InputError: there are none, or they cannot be read.
        """
        rows: list[TableRow] = []
        for path in self._expand():
            rows += islice(filter(self._is_sample, self._read(path, split=self.split)), self.limit)
        if not rows:
            raise self._without_rows()
        return rows

    def digest(self) -> str | None:
        return digest_of_rows(self.rows)

    def _without_rows(self) -> InputError:
        return InputError(f"task {self.name}: {self.data} holds no rows", hint="give data with at least one row")

    def _is_sample(self, row: TableRow) -> bool:
        return True

    def _expand(self) -> list[str]:
        try:
            return expand(self.data)
        except InputError as error:
            raise InputError(f"task {self.name}: {error}", hint=error.hint) from None

    def _read(self, path: str, *, split: str) -> Iterator[TableRow]:
        try:
            yield from read_rows(path, split=split, name=self.subset)
        except InputError as error:
            raise InputError(f"task {self.name}: {error}", hint=error.hint) from None

    @property
    def where(self) -> str:
        """How messages about the data begin."""
        return f"task {self.name}: {self.data}"


class FewShot(RowTask):
    """A row task that can show solved rows before each sample; no row is both shown and a sample."""

    num_fewshot: Annotated[int, Field(ge=0), AS_COUNT] = 0
    """How many solved rows to show."""
    fewshot_data: str | None = None
    """Where they are from: its first rows. `data` if not given."""
    fewshot_split: str | None = None
    """Its split, where there are splits. With neither of the two given, the last rows of `data` are shown."""
    fewshot_separator: str = "\n\n"
    """Between them."""

    @cached_property
    def shown(self) -> list[TableRow]:
        """The solved rows.

        Raises:
            InputError: there are too few, or they cannot be read.
        """
        if not self.num_fewshot:
            return []
        source = self.fewshot_data or self.data
        separate = self.fewshot_data is not None or self.fewshot_split is not None
        rows = self._read(source, split=self.fewshot_split or self.split)
        shown = list(islice(rows, self.num_fewshot)) if separate else list(deque(rows, maxlen=self.num_fewshot))
        if len(shown) < self.num_fewshot:
            raise InputError(
                f"task {self.name}: {source} holds {len(shown)} rows, too few to show {self.num_fewshot}",
                hint="lower num_fewshot, or name other rows (fewshot_data, fewshot_split)",
            )
        return shown

    def fewshot_prefix(self, solved: Callable[[TableRow], str]) -> str:
        """The rows shown, solved, each followed by the separator."""
        return "".join(solved(row) + self.fewshot_separator for row in self.shown)

    def digest(self) -> str | None:
        return digest_of_rows([*self.shown, None, *self.rows])

    def _without_rows(self) -> InputError:
        if not self.shown:
            return super()._without_rows()
        return InputError(
            f"task {self.name}: {self.data} holds no other rows than those that num_fewshot shows",
            hint="lower num_fewshot, or name other rows to show (fewshot_data, fewshot_split)",
        )

    def _is_sample(self, row: TableRow) -> bool:
        return row not in self.shown
