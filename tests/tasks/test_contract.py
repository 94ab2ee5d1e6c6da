"""What every kind of task keeps to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerpeel.inference.requests import Generation, Likelihood
from layerpeel.tasks.base import Sample
from layerpeel.tasks.registry import TASKS
from tests.families import tiny_tokenizer
from tests.tasks.conftest import task_of

ROWS: dict[str, list[dict[str, Any]]] = {
    "choice": [{"context": "w3 w4", "choices": ["w5", "w6 w7"], "answer": index % 2} for index in range(4)],
    "generate": [{"prompt": f"w{index}", "target": "w5 w6"} for index in range(4)],
    "harness": [{"q": f"w{index}", "choices": ["w5", "w6"], "label": index % 2} for index in range(4)],
    "pairs": [{"sentence_good": f"w{index} w5", "sentence_bad": f"w{index} w6"} for index in range(4)],
    "perplexity": [{"text": "w5 w6 w7 " * (index + 1)} for index in range(4)],
}


def options_of(kind: str, folder: Path) -> dict[str, Any]:
    """Options of a task over the kind's rows."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]), encoding="utf-8")
    if kind != "harness":
        return {"kind": kind, "name": "t", "data": str(rows)}
    pytest.importorskip("lm_eval")
    definition = {
        "task": "chosen",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": str(rows)}},
        "validation_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "chosen.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")
    return {"kind": kind, "name": "t", "task": str(folder / "chosen.yaml")}


def answers_to(samples: Sequence[Sample]) -> list[list[Any]]:
    """Answers of the right kinds, of which some are better than others."""
    return [
        [
            "w5 w6" if isinstance(request, Generation) else Likelihood(-1.0 - (index + place) % 3, False)
            for place, request in enumerate(sample.requests)
        ]
        for index, sample in enumerate(samples)
    ]


@pytest.mark.parametrize("kind", TASKS)
def test_scores_follow_from_samples_and_answers_alone(kind: str, tmp_path: Path) -> None:
    options, tokenizer = options_of(kind, tmp_path), tiny_tokenizer()
    task = task_of(**options)
    task.check()
    samples = task.samples(tokenizer)
    answers = answers_to(samples)
    score = task.score(samples, answers)
    assert len(samples) == score.n == 4
    assert task.requests(tokenizer) == [request for sample in samples for request in sample.requests]
    task.samples(tokenizer)
    assert task.score(samples, answers) == task_of(**options).score(samples, answers) == score


@pytest.mark.parametrize("kind", TASKS)
def test_some_of_the_samples_can_be_scored(kind: str, tmp_path: Path) -> None:
    task = task_of(**options_of(kind, tmp_path))
    samples = task.samples(tiny_tokenizer())
    answers = answers_to(samples)
    assert task.score(samples[1:3], answers[1:3]).n == 2
