"""Rows that a model cannot answer rightly: named or counted, and of no weight for the others."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from layerpeel.errors import RunError
from layerpeel.inference.engine import Engine
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.processes.progress import print_once
from layerpeel.tasks.base import Task
from layerpeel.tasks.evaluation import evaluate, score_tasks
from layerpeel.tasks.scores import TaskScore
from tests.families import tiny_model, tiny_tokenizer
from tests.tasks.conftest import MakeTask, input_error

SPOILT = "w7"
ROWS: dict[str, dict[str, Any]] = {
    "choice": {"context": "w4 w5", "choices": ["w5", "w6"], "answer": 0},
    "pairs": {"sentence_good": "w4 w5 w6", "sentence_bad": "w4 w6 w5"},
    "perplexity": {"text": "w4 w5 w6"},
    "generate": {"prompt": "w4 w5", "target": "w6"},
}


@pytest.fixture(autouse=True)
def say_again() -> None:
    print_once.cache_clear()


def score_of(task: Task, tokenizer: PreTrainedTokenizerBase | None = None, model: Any = None) -> TaskScore:
    return evaluate(model or tiny_model("llama"), tokenizer or tiny_tokenizer(), [task]).scores["t"]


def spoilt_model(dtype: torch.dtype = torch.float32) -> Any:
    """A teacher that gives NaN on texts with one word, from layer 0 on."""
    model = tiny_model("llama").to(dtype)
    with torch.no_grad():
        model.get_input_embeddings().weight[int(SPOILT[1:])] = float("nan")
    return model


@pytest.mark.parametrize("kind", ROWS)
def test_nan_on_some_texts_is_named_by_task_row_layer_and_dtype(make: MakeTask, tmp_path: Path, kind: str) -> None:
    row = {
        column: value.replace("w4", SPOILT) if isinstance(value, str) else value for column, value in ROWS[kind].items()
    }
    task = make(kind, [ROWS[kind], row, ROWS[kind]])
    with pytest.raises(RunError) as caught:
        score_of(task, model=spoilt_model(torch.bfloat16))
    said = str(caught.value)
    assert said.startswith(f"task t: {tmp_path / 'rows.jsonl'}, line 2: ")
    assert "the model first gives NaN or infinity in what enters layer 0, in bfloat16" in said
    assert "look for NaN or infinity in the weights" in str(caught.value.hint)


@pytest.mark.parametrize("kind", ROWS)
def test_nan_on_some_texts_changes_nothing_on_others(make: MakeTask, kind: str) -> None:
    task = make(kind, [ROWS[kind]] * 3)
    assert score_of(task, model=spoilt_model()) == score_of(task)


@pytest.mark.parametrize("kind", ["choice", "generate"])
def test_nan_without_one_layer_names_the_layer(make: MakeTask, kind: str) -> None:
    model = tiny_model("llama")
    layerwise = LayerwiseModel(model)
    model.model.layers[1].register_forward_hook(lambda layer, inputs, output: output * float("nan"))
    model.model.layers[2].register_forward_hook(lambda layer, inputs, output: output.nan_to_num(0.0))
    task = make(kind, [ROWS[kind]])
    score_tasks(Engine(layerwise, tiny_tokenizer()), [task])  # layer 2 hides what layer 1 does
    with pytest.raises(RunError, match=r"line 1: .* with the layer at position 2 skipped") as caught:
        score_tasks(Engine(layerwise, tiny_tokenizer(), [2]), [task])
    assert "protect that layer" in str(caught.value.hint)


def test_a_target_that_does_not_fit_is_refused_by_row_and_its_neighbours_are_left_alone(make: MakeTask) -> None:
    prompt = " ".join(f"w{4 + index}" for index in range(20))
    rows = [{"prompt": prompt, "target": "w5 w6"} for _ in range(3)]
    long = make("generate", [*rows, {"prompt": "w4", "target": "w5 " * 60}])
    message, hint = input_error(lambda: score_of(long))
    assert message.endswith("rows.jsonl, line 4: its target takes 68 tokens, and the model reads 64 at a time")
    assert hint == "leave such rows out, shorten their targets, or set max_new_tokens"
    metric = {"metric": "copy"}
    alone = score_of(make("generate", rows, **metric))
    beside = score_of(make("generate", [*rows, {"prompt": "w4", "target": "w5 " * 50}], **metric))
    assert beside.cut == 0 and beside.n == 4  # prompts of 20 have room for 44 new tokens
    with_one_less = (
        beside.value * 4 - score_of(make("generate", [{"prompt": "w4", "target": "w5 " * 50}], **metric)).value
    )
    assert with_one_less == pytest.approx(alone.value * 3)


@pytest.mark.parametrize(
    "row",
    [
        {"context": "w4 " * 90, "choices": ["w5", "w6"], "answer": 0},
        {"context": "w4 w5 w6", "choices": ["w5 " * 80, "w6"], "answer": 0},  # the choice alone is too long
        {"prompt": "w4 " * 90, "target": "w5"},
    ],
    ids=["context", "choice", "prompt"],
)
def test_prompts_that_are_cut_are_counted_and_said(
    make: MakeTask, row: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    kind = "choice" if "choices" in row else "generate"
    score = score_of(make(kind, [ROWS[kind], row, ROWS[kind]]))
    assert asdict(score)["cut"] == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "task t: 1 of 3 prompts are longer than the model's context of 64 tokens and are cut at their" in said
    assert "rows.jsonl, line 2 is the first)" in said


def with_ends(tokenizer: Any, single: str) -> Any:
    """The tokenizer, with special tokens set around a text."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize("kind", ROWS)
def test_a_tokenizer_that_appends_its_end_of_text_changes_no_score(make: MakeTask, kind: str) -> None:
    task = make(kind, [ROWS[kind], {**ROWS[kind]}])
    appending, plain = with_ends(tiny_tokenizer(), "$A </s>"), tiny_tokenizer()
    assert appending.encode("w4") == [4, 2]
    assert task.requests(appending) == task.requests(plain)
    assert score_of(task, appending) == score_of(task, plain)


@pytest.mark.parametrize("kind", ROWS)
def test_rendered_prompts_and_texts_have_one_beginning_of_text(make: MakeTask, kind: str) -> None:
    first = {"choice": "context", "pairs": "sentence_good", "perplexity": "text", "generate": "prompt"}[kind]
    rendered = {column: f"<s>{v}" if column == first else v for column, v in ROWS[kind].items()}
    tokenizer = with_ends(tiny_tokenizer(), "<s> $A </s>")
    plain = make(kind, [ROWS[kind]]).requests(tokenizer)
    assert make(kind, [rendered]).requests(tokenizer) == plain


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("perplexity", {"text": "жила была кошка w5"}),
        ("choice", {"context": "w4", "choices": ["да", "нет"], "answer": 0}),
        ("pairs", {"sentence_good": "w4 w5", "sentence_bad": "кошка w4"}),
        ("generate", {"prompt": "кто там", "target": "w5"}),
    ],
)
def test_text_of_unknown_tokens_is_said(
    make: MakeTask, kind: str, row: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.unk_token = "w3"
    score_of(make(kind, [ROWS[kind], row, row]), tokenizer)
    said = " ".join(capsys.readouterr().err.split())
    assert "task t: 2 of 3 rows hold a text that the tokenizer does not know" in said and "line 2 is the first" in said
    score_of(make(kind, [ROWS[kind]]), tokenizer)
    assert "does not know" not in capsys.readouterr().err
