"""Cells of files as prompts, targets and choices: the text that the file has."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from layerpeel.tasks.base import Task
from tests.tasks.conftest import MakeTask, input_error, score_of, task_of

CELLS = ["007", "1.50", "true", "NA", "2024-01-31", "4"]


def prompts_of(task: Task, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return [str(tokenizer.decode(request.prompt)) for request in task.requests(tokenizer)]  # type: ignore[union-attr]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_target_is_matched_as_the_file_has_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, ending: str
) -> None:
    between = "," if ending == "csv" else "\t"
    path = tmp_path / f"rows.{ending}"
    path.write_text("\n".join(between.join(row) for row in [("prompt", "target"), *((f"{c}:", c) for c in CELLS)]))
    task = task_of(kind="generate", name="t", data=str(path))
    assert prompts_of(task, tokenizer) == [f"{c}:" for c in CELLS]
    assert score_of(task, tokenizer, CELLS).value == 1.0


def test_an_empty_cell_changes_no_other(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,target\na,4\nb,\n")
    assert score_of(task_of(kind="generate", data=str(path)), tokenizer, ["4", ""]).value == 1.0


def test_json_numbers_are_compared_as_written(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": 1.0, "target": 1.50}\n{"prompt": true, "target": {"a": [7]}}\n')
    task = task_of(kind="generate", data=str(path))
    assert "'{target}' is \"{'a': [7]}\"" in input_error(task.check)[0] and ", line 2: " in input_error(task.check)[0]
    path.write_text('{"prompt": 1.0, "target": 1.50}\n{"prompt": true, "target": 7}\n')
    task = task_of(kind="generate", data=str(path))
    assert prompts_of(task, tokenizer) == ["1.0", "true"]
    assert score_of(task, tokenizer, ["1.50", "7"]).value == 1.0


def test_choices_of_numbers_and_an_index(make: MakeTask, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"context": "?", "choices": [1.50, 2.0, true], "answer": 1}\n')
    task = task_of(kind="choice", data=str(path))
    assert [tokenizer.decode(request.continuation) for request in task.requests(tokenizer)] == [
        " 1.50",
        " 2.0",
        " true",
    ]
    assert score_of(task, tokenizer, [-2.0, -1.0, -3.0]).value == 1.0


def test_a_bad_label_names_its_row(make: MakeTask) -> None:
    rows = [{"context": "?", "choices": ["a", "b"], "answer": answer} for answer in ("A", "B", "4")]
    assert "rows.jsonl, line 3: column 'answer' holds '4', expected which" in input_error(make("choice", rows).check)[0]
