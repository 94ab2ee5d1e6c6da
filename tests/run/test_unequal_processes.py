"""A run in two processes (gloo) that differ in memory, and one of which runs out of it: the run of one process.

It generates, trains, tracks and reports, replicated and under FSDP2.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from layerpeel.cli.process import main
from layerpeel.config.reading import load_config
from layerpeel.inference import budget
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.losses.base import StepOutputs
from layerpeel.processes.distributed import RANK
from layerpeel.run.folder import Run
from layerpeel.run.loop import peel
from layerpeel.training import gradients
from layerpeel.training.forward import run_both
from layerpeel.training.student import Student
from tests.families import save_texts, save_tiny, tiny_texts
from tests.launching import launch
from tests.quick import measure_quickly

FREE = [2**30, 2**21]  # bytes, of which each process thinks that it has them
MOST = {"scoring": 64, "training": 24}  # tokens at a time, for which the second process has memory in fact
FULL = "planted: no memory in"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of one process; its config is in the folder above."""
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("unequal")
    text = save_texts(folder / "text.jsonl", tiny_texts(3 + 11 * line % 28 for line in range(40)))
    task = {"data": str(text), "limit": 20}
    write = {"prompt": "{text}", "target": "{text}", "metric": "copy", "max_new_tokens": 5}
    distill = {"tokens_per_round": 384, "tokens_per_step": 96, "sequence_length": 24, "batch_size": 4}
    config: dict[str, Any] = {
        "teacher": str(save_tiny(folder / "teacher")),
        "output": str(folder / "one"),
        "stop": {"target_layers": 5},
        "score": {"protect": {"first": 2}},
        "tasks": [{"kind": "perplexity", **task}, {"kind": "generate", **task, **write}],
        "distill": {"text": str(text), "learning_rate": 1e-3, **distill},
        "trackers": ["tensorboard"],
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return peel(load_config(folder / "run.yaml"))


def run_in_two(alone: Run, output: Path, full: str, **options: bool) -> str:
    """Runs the same in two processes; gives what they said.

    Args:
        full: what the second has too little memory for.
    """
    config = str(alone.folder.parent / "run.yaml")
    return launch("-m", "tests.run.test_unequal_processes", config, f"output={output}", full, **options)


def same_run(alone: Run, both: Run) -> None:
    """One process's numbers, with the report and the curves."""
    assert alone.teacher and both.teacher and both.teacher.attention == alone.teacher.attention == "sdpa"
    (one,), (other,) = alone.rounds, both.rounds
    assert other.removed == one.removed and other.training.tokens == one.training.tokens
    assert other.scores.importance == pytest.approx(one.scores.importance, abs=1e-6)
    for a, b, tolerance in ((alone.teacher, both.teacher, 1e-6), (one.end, other.end, 1e-4)):
        assert b.evaluation.scores.keys() == {"perplexity", "generate"}
        for name, score in a.evaluation.scores.items():
            assert b.evaluation.scores[name].value == pytest.approx(score.value, rel=tolerance)
    weights, others = (load_file(run.student_folder / "model.safetensors") for run in (alone, both))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert (value - others[name]).norm() <= 1e-4 * value.norm(), name
    measured = json.loads((both.folder / "report" / "measurements.json").read_text())
    assert set(measured["depths"]) == {"0", "1"} and measured["samples"]
    assert list(both.folder.rglob("events.out.tfevents*"))


@pytest.mark.slow
def test_with_all_layers_on_each(alone: Run, tmp_path: Path) -> None:
    told = run_in_two(alone, tmp_path / "two", "scoring training")
    assert f"{FULL} scoring" in told and f"{FULL} training" in told
    same_run(alone, Run(tmp_path / "two"))


@pytest.mark.slow
def test_with_layers_split(alone: Run, tmp_path: Path) -> None:
    """There training cannot go on in smaller micro-batches: both processes end, and what was done is kept."""
    told = run_in_two(alone, tmp_path / "two", "scoring training", fsdp=True, dies=True)
    assert f"{FULL} scoring" in told and f"{FULL} training" in told
    said = " ".join(told.split())
    assert "error (process 1): out of memory in training, with 2 rows of 24 tokens at a time hint: lower" in said
    told = run_in_two(alone, tmp_path / "two", "scoring", fsdp=True)
    assert f"{FULL} scoring" in told  # in the evaluation of the student
    same_run(alone, Run(tmp_path / "two"))


def _run_with_too_little_memory(full: list[str]) -> None:
    """What each of the processes runs."""
    measure_quickly(pytest.MonkeyPatch())
    budget._free_bytes = lambda device: FREE[RANK]
    if RANK and "scoring" in full:
        on_branches = LayerwiseModel.layer_on_branches

        def scored(model: LayerwiseModel, position: int, hidden: Tensor, *rest: Any) -> Tensor:
            *_, tokens_per_call = rest
            _check_room("scoring", min(hidden.shape[0] * hidden.shape[1], tokens_per_call or model.tokens_per_call))
            return on_branches(model, position, hidden, *rest)

        LayerwiseModel.layer_on_branches = scored  # type: ignore[method-assign]
    if RANK and "training" in full:

        def trained(student: Student, batch: Any, *arguments: Any, **options: Any) -> StepOutputs:
            outputs = run_both(student, batch, *arguments, **options)
            _check_room("training", batch["input_ids"].numel())
            return outputs

        gradients.run_both = trained
    main()


def _check_room(work: str, tokens: int) -> None:
    if tokens > MOST[work]:
        print(FULL, work, file=sys.stderr)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


if __name__ == "__main__":
    planted = sys.argv.pop().split()
    sys.argv = ["layerpeel", "run", sys.argv[1], "--set", sys.argv[2]]
    _run_with_too_little_memory(planted)
