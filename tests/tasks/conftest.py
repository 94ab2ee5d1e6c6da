"""A tokenizer with one token a byte, and rows on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from layerpeel.config.run import TaskConfig
from layerpeel.errors import InputError
from layerpeel.inference.requests import Likelihood
from layerpeel.tasks.base import Task
from layerpeel.tasks.registry import make_tasks
from layerpeel.tasks.scores import TaskScore
from tests.families import byte_tokenizer

MakeTask = Callable[..., Any]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def task_of(**options: Any) -> Task:
    return make_tasks([TaskConfig(**options)])[0]


@pytest.fixture
def make(tmp_path: Path) -> MakeTask:
    """A task over rows that are written to `rows.jsonl`."""

    def build(kind: str, rows: list[dict[str, Any]], **options: Any) -> Task:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows) or "\n", encoding="utf-8")
        return task_of(kind=kind, name="t", **({"data": str(path)} | options))

    return build


def input_error(call: Callable[[], Any]) -> tuple[str, str]:
    """Message and hint of the InputError that a call raises."""
    with pytest.raises(InputError) as caught:
        call()
    assert caught.value.hint
    return str(caught.value), caught.value.hint


def score_of(task: Task, tokenizer: Any, values: list[Any]) -> TaskScore:
    """The score of these log-probabilities or texts, in the order of the requests."""
    rest = iter(values)
    samples = task.samples(tokenizer)
    answers = [
        [value if isinstance(value := next(rest), str) else Likelihood(value, False) for _ in sample.requests]
        for sample in samples
    ]
    return task.score(samples, answers)
