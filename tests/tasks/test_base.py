"""Templates, few-shot rows, the split of context and continuation, and scores of models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from layerpeel.inference.encoding import encode_pair
from layerpeel.tasks.scores import Evaluation, TaskScore
from layerpeel.tasks.templates import fill
from tests.tasks.conftest import MakeTask, input_error, task_of

ROW = {"q": "Why?", "choices": ["x", "y"], "deep": {"text": ["a", "b"]}, "n": 3}
CHOICE = {"context": "c", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{q} {choices[1]} {n}", "Why? y 3"),
        ("{deep[text][1]}", "b"),
        (r"\boxed{ } {} {{q}}", r"\boxed{ } {} {Why?}"),
    ],
)
def test_templates(template: str, text: str) -> None:
    assert fill(template, ROW, "here") == text


@pytest.mark.parametrize(
    ("template", "message", "hint"),
    [
        ("{question}", "here: no column 'question'", "columns there: q, choices, deep, n"),
        ("{choices[2]}", "here: column 'choices' has no '2'", "it holds \"['x', 'y']\""),
        ("{deep[label]}", "here: column 'deep' has no 'label'", "it holds \"{'text': ['a', 'b']}\""),
        (
            "{q.upper}",
            "here: the template has '{q.upper}', but templates read columns and entries, not attributes",
            "as in {question} or {choices[0]}",
        ),
    ],
)
def test_what_is_said_of_a_template(template: str, message: str, hint: str) -> None:
    assert input_error(lambda: fill(template, ROW, "here")) == (message, hint)


def questions(count: int) -> list[dict[str, Any]]:
    return [{"context": f"question {index}:", "choices": ["no", "yes"], "answer": index % 2} for index in range(count)]


def prompts(task: Any, tokenizer: Any) -> list[str]:
    return [tokenizer.decode(request.context) for request in task.requests(tokenizer)][::2]


def test_rows_that_are_shown_are_not_asked(make: MakeTask, tokenizer: PreTrainedTokenizerFast) -> None:
    task = make("choice", questions(5), num_fewshot=2)
    solved = "question 3: yes\n\nquestion 4: no\n\n"
    assert prompts(task, tokenizer) == [f"{solved}question {index}:" for index in range(3)]


def test_a_split_that_a_file_has_not_shows_no_row_that_is_asked(
    make: MakeTask, tokenizer: PreTrainedTokenizerFast
) -> None:
    task = make("choice", questions(4), num_fewshot=1, fewshot_split="dev", limit=2)
    assert prompts(task, tokenizer) == [f"question 0: no\n\nquestion {index}:" for index in (1, 2)]


def test_rows_to_show_from_another_file(make: MakeTask, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    shown = tmp_path / "shown.jsonl"
    shown.write_text("".join(json.dumps(CHOICE | {"context": f"shown {i}:"}) + "\n" for i in range(3)))
    task = make("choice", questions(2), num_fewshot=2, fewshot_data=str(shown))
    assert prompts(task, tokenizer)[1] == "shown 0: a\n\nshown 1: a\n\nquestion 1:"


def test_rows_to_show_from_another_split(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    dev, test = (datasets.Dataset.from_list(rows) for rows in (questions(3)[2:], questions(2)))
    datasets.DatasetDict({"dev": dev, "test": test}).save_to_disk(tmp_path / "saved")
    task = task_of(kind="choice", data=str(tmp_path / "saved"), num_fewshot=1, fewshot_split="dev")
    assert prompts(task, tokenizer) == [f"question 2: no\n\nquestion {index}:" for index in range(2)]


def test_what_is_said_of_tasks(make: MakeTask, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert input_error(make("choice", [CHOICE], num_fewshot=2).check)[0] == (
        f"task t: {path} holds 1 rows, too few to show 2"
    )
    assert input_error(make("choice", []).check)[0] == f"task t: {path} holds no rows"
    assert input_error(make("choice", [CHOICE], num_fewshot=1).check)[0] == (
        f"task t: {path} holds no other rows than those that num_fewshot shows"
    )
    assert input_error(lambda: make("choise", []))[0].startswith("unknown task kind 'choise'; did you mean 'choice'?")
    assert input_error(lambda: make("choice", [], promt="x"))[0].startswith(
        "task t: promt: unknown key; did you mean 'prompt'?"
    )
    assert input_error(lambda: make("choice", [], choices=[False, True]))[0].endswith(
        "found [False, True] (YAML reads yes, no, on, off, true and false as booleans: put them in quotes)"
    )
    absent = make("choice", [], data=str(tmp_path / "absent.jsonl"))
    assert input_error(absent.check)[0] == f"task t: no such file: {tmp_path / 'absent.jsonl'}"
    assert input_error(make("pairs", [], data=str(tmp_path / "*.csv")).check)[0] == (
        f"task t: no file matches {tmp_path / '*.csv'}"
    )


def test_an_empty_context_is_the_start_of_text(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, end = tuple(tokenizer.encode("ab")), tokenizer.eos_token_id
    assert encode_pair(tokenizer, "", "ab") == ((end,), ids)
    assert encode_pair(tokenizer, "  ", "ab") == ((end,), tuple(tokenizer.encode("  ab")))
    assert encode_pair(tokenizer, "a ", "b") == (ids[:1], tuple(tokenizer.encode(" b")))


KIT_TOKENIZERS = ["models/storyteller-18", "models/stories260K-hf", "tokenizers/tok_qwen2"]
PAIRS = [
    ("Once upon a time", " there was a cat"),
    ("Жила-была кошка. ", "Она спала"),
    ("Question: what?\nAnswer:", " 42"),
    ("trailing spaces \n ", "word"),
    ("abc", "def"),
    ("x", "\n\ny"),
]


@pytest.mark.parametrize("name", KIT_TOKENIZERS)
def test_pairs_are_split_as_the_harness_does(kit: Path, name: str) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    tokenizer = AutoTokenizer.from_pretrained(kit / name)
    harness = HFLM.__new__(HFLM)  # its tokenizing alone, without a model
    harness.tokenizer, harness.backend, harness.add_bos_token = tokenizer, "causal", None
    harness.custom_prefix_token_id = None
    for context, continuation in PAIRS:
        expected = harness._encode_pair(context, continuation)
        assert [list(ids) for ids in encode_pair(tokenizer, context, continuation)] == [list(ids) for ids in expected]
    start, rest = encode_pair(tokenizer, "", " there was")
    assert list(start) == [harness.prefix_token_id]
    assert list(rest) == harness.tok_encode(" there was", add_special_tokens=False)


def test_mean_and_standard_error() -> None:
    score = TaskScore.of_mean([1.0, 0.0, 1.0, 1.0])
    assert (score.value, score.n) == (0.75, 4)
    assert score.stderr == pytest.approx((0.75 / 3 / 4) ** 0.5)  # sum of squares 0.75, over n - 1, over n
    assert TaskScore.of_mean([1.0]).stderr == 0


def test_aggregates() -> None:
    teacher = Evaluation({"a": TaskScore(0.8, 0.1, 5), "p": TaskScore(6.0, 0.1, 5, lower_is_better=True)})
    student = Evaluation({"a": TaskScore(0.4, 0.1, 5), "p": TaskScore(8.0, 0.1, 5, lower_is_better=True)})
    assert student.qualities(teacher) == {"a": 0.4, "p": 0.75}
    assert student.aggregate(teacher) == pytest.approx((0.4 + 0.75) / 2)
    assert student.aggregate(teacher, "relative") == pytest.approx((0.5 + 0.75) / 2)
    assert teacher.aggregate(teacher) == pytest.approx(0.9)


@pytest.mark.parametrize("how", ["mean", "relative"])
@pytest.mark.parametrize(
    ("reference", "value", "quality"),
    [(2.0, 0.0, 1000.0), (0.0, 0.0, 1.0), (0.0, 2.0, 0.0), (3.0, 1e200, 3e-200), (2.0, 1e-9, 1000.0)],
)
def test_an_error_of_zero_or_a_huge_one_has_a_quality(reference: float, value: float, quality: float, how: str) -> None:
    def evaluation(value: float) -> Evaluation:
        return Evaluation({"p": TaskScore(value, 0.1, 2, lower_is_better=True, influences=(0.5, -0.5))})

    teacher, student = evaluation(reference), evaluation(value)
    assert student.qualities(teacher) == {"p": pytest.approx(quality)}
    assert student.aggregate(teacher, how) == pytest.approx(quality)
    assert math.isfinite(student.aggregate_stderr(teacher, how))
