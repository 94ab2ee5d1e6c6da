"""A scoring that is stopped, runs out of memory, or is shared by processes gives the numbers of one that is not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from layerpeel.config.run import TaskConfig
from layerpeel.config.score import ScoreConfig
from layerpeel.data.rows import Rows
from layerpeel.errors import RunError
from layerpeel.importance.scores import LayerScores
from layerpeel.importance.scoring import score_layers
from layerpeel.inference.answer_cache import AnswerCache
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.tasks.base import Task
from layerpeel.tasks.registry import make_tasks
from tests.families import save_tiny, tiny_ids, tiny_model, tiny_texts, tiny_tokenizer

TEXT = Rows(tiny_ids(12), torch.ones(12, 17, dtype=torch.bool))


@pytest.fixture
def tasks(tmp_path: Path) -> list[Task]:
    """Tasks that read and that write."""
    rows = [{"text": text, "prompt": text[:12], "target": text[12:20]} for text in tiny_texts([20] * 12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(tmp_path / "rows.jsonl")
    return make_tasks(
        [
            TaskConfig(kind="perplexity", data=data),
            TaskConfig(kind="generate", data=data, metric="copy"),
        ]
    )


def scored(tasks: list[Task], layerwise: LayerwiseModel | None = None, **options: Any) -> LayerScores:
    answer_cache = options.pop("answer_cache", None)
    config = ScoreConfig(**({"memory": 2**20} | options))  # so little that there are several batches
    return score_layers(
        layerwise or small(), tiny_tokenizer(), config, tasks=tasks, text=TEXT, answer_cache=answer_cache
    )


def small() -> LayerwiseModel:
    """A model whose budget holds few tokens."""
    return LayerwiseModel(tiny_model("llama", hidden_size=128, head_dim=32))


def watched(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """Counts forward passes over the layers; interrupts one."""
    forward, passes = LayerwiseModel.forward_with_skips, []

    def counting(self: LayerwiseModel, *args: Any, **options: Any) -> Any:
        if len(passes) == stop_after:
            raise KeyboardInterrupt
        passes.append(1)
        return forward(self, *args, **options)

    monkeypatch.setattr(LayerwiseModel, "forward_with_skips", counting)
    return passes


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["task_quality", "teacher_kl"])
def test_an_interrupted_scoring_goes_on_where_it_was(
    tasks: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    def answer_cache() -> AnswerCache:
        return AnswerCache(tmp_path / "kept/answers.jsonl", "this model")

    with monkeypatch.context() as patch:
        all_passes = watched(patch)
        full = scored(tasks, decide=metric)
    trials = 2 * (metric == "task_quality")  # passes that find out whether rows may branch
    assert len(all_passes) - trials >= 4
    stop = len(all_passes) - 2
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        watched(patch, stop_after=stop)
        scored(tasks, decide=metric, answer_cache=answer_cache())
    kept = len(answer_cache())
    assert kept
    with (tmp_path / "kept/answers.jsonl").open("a") as file:
        file.write('{"key": "torn by a cra')
    with monkeypatch.context() as patch:
        passes = watched(patch)
        resumed = scored(tasks, decide=metric, answer_cache=answer_cache())
    assert resumed.importance == full.importance and resumed.stderr == full.stderr
    assert len(passes) <= len(all_passes) - kept + trials
    with monkeypatch.context() as patch:
        passes = watched(patch)
        assert scored(tasks, decide=metric, answer_cache=answer_cache()).importance == full.importance
    assert len(passes) <= trials  # all answers are cached


def test_answers_of_another_model_are_dropped(tmp_path: Path) -> None:
    answer_cache = AnswerCache(tmp_path / "a.jsonl", "one")
    answer_cache.keep_value([1.5], "how much", [1, 2])
    assert AnswerCache(tmp_path / "a.jsonl", "one").find_value("how much", [1, 2]) == [1.5]
    assert AnswerCache(tmp_path / "a.jsonl", "one").find_value("how much", [1, 3]) is None
    assert AnswerCache(tmp_path / "a.jsonl", "another").find_value("how much", [1, 2]) is None
    assert len(AnswerCache(tmp_path / "a.jsonl", "one")) == 0


ERRORS: dict[str, Callable[[], Exception]] = {
    "gpu": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
}


def limited(most: int, error: Callable[[], Exception]) -> LayerwiseModel:
    """A model whose third layer has memory for so many tokens at a time."""
    layerwise = small()
    run = layerwise.layers[2].forward

    def forward(hidden: torch.Tensor, *args: Any, **options: Any) -> Any:
        if hidden.shape[0] * hidden.shape[1] > most:
            raise error()
        return run(hidden, *args, **options)

    layerwise.layers[2].forward = forward  # type: ignore[method-assign]
    return layerwise


@pytest.mark.parametrize("metric", ["task_quality", "teacher_kl", "block_influence"])
@pytest.mark.parametrize("error", ERRORS)
def test_running_out_of_memory_halves_the_budget_and_goes_on(tasks: list[Task], metric: str, error: str) -> None:
    tasks = tasks[:1] if metric == "task_quality" else []
    full = scored(tasks, decide=metric, memory=None)
    assert full.memory_halved == 0
    scores = scored(tasks, limited(40, ERRORS[error]), decide=metric, memory=2**27)
    assert scores.importance == pytest.approx(full.importance, abs=1e-5)
    assert scores.memory_halved > 0 and scores.memory == 2**27 >> scores.memory_halved


def test_the_deciding_metric_begins_with_what_the_cheap_one_left_of_the_budget(tasks: list[Task]) -> None:
    failures: list[Exception] = []

    def error() -> Exception:
        failures.append(ERRORS["cpu"]())
        return failures[-1]

    shortlist = {"by": "teacher_kl", "keep": 2}
    scores = scored(tasks[:1], limited(40, error), shortlist=shortlist, memory=2**27)
    assert scores.cheap
    assert 0 < scores.cheap.memory_halved <= scores.memory_halved == len(failures)
    assert scores.memory == 2**27 >> len(failures)


def test_when_not_even_a_row_fits_it_says_so(tasks: list[Task]) -> None:
    with pytest.raises(RunError, match=r"out of memory with a single row of \d+ tokens in 5 branches") as caught:
        scored(tasks[:1], limited(10, ERRORS["cpu"]))
    assert caught.value.hint
    with pytest.raises(ValueError, match="another mistake"):
        scored(tasks[:1], limited(10, lambda: ValueError("another mistake")))


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tasks: list[Task], tmp_path: Path) -> None:
    config = {
        "teacher": str(save_tiny(tmp_path / "teacher")),
        "output": str(tmp_path / "run"),
        "device": "cpu",
        "stop": {"target_layers": 5},
        "tasks": [task.model_dump(exclude_none=True) for task in tasks],
        "score": {"shortlist": {"by": "teacher_kl", "keep": 3}, "race": {}, "tokens": 256},
        "distill": {"text": str(tmp_path / "rows.jsonl"), "tokens_per_round": 0, "sequence_length": 16},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = ["-m", "layerpeel", "score", str(tmp_path / "run.yaml"), "--json", "-o"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    printed = {}
    for name, start in (("one", []), ("two", launch)):
        done = subprocess.run(
            [sys.executable, *start, *command, str(tmp_path / name)], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        printed[name] = json.loads(done.stdout)  # printed once
        assert json.loads((tmp_path / name / "scores.json").read_text()) == printed[name]
    one, two = printed["one"], printed["two"]
    assert two["importance"] == pytest.approx(one["importance"], abs=1e-6)
    assert two["cheap"]["importance"] == pytest.approx(one["cheap"]["importance"], abs=1e-6)
    for each, other in ((one, two), (one["cheap"], two["cheap"])):
        assert each["stderr"] and other["stderr"] == pytest.approx(each["stderr"], abs=1e-6)
    answered = [(tmp_path / "two" / f"answers.{rank}.jsonl").read_text().count("\n") for rank in (0, 1)]
    assert min(answered) >= 1  # both worked
