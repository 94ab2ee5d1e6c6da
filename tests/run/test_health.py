"""Signs of failure: found in journals written by hand, silent where all is well, and found in a real run."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import Tensor

from layerpeel.config.reading import parse_config
from layerpeel.losses.base import Loss, StepOutputs
from layerpeel.run.events import RoundEnd, TeacherRecord
from layerpeel.run.folder import Run
from layerpeel.run.health import findings, note_findings
from layerpeel.run.loop import peel
from layerpeel.run.writing import OpenRun
from layerpeel.storage.hash_chain import append, checksum, to_line
from layerpeel.tasks.scores import TaskScore
from tests.families import save_tiny

TASKS = [
    {"name": "pick", "kind": "choice", "data": "a.jsonl"},
    {"name": "copy", "kind": "generate", "data": "b.jsonl", "metric": "copy"},
]
HEALTHY = {
    "layers": [3],
    "steps": 100,
    "skipped": 0,
    "restarts": 0,
    "first_loss": 2.0,
    "last_loss": 1.0,
    "gradient_norm": 0.5,
    "losses": {"kl": [1.5, 0.8], "hidden_mse": [0.5, 0.2]},
    "without_gradient": [],
}


def score(value: float, n: int = 400, **more: float) -> dict[str, Any]:
    return {"value": value, "stderr": math.sqrt(abs(value * (1 - value)) / n), "n": n, "lower_is_better": False, **more}


def journal(
    folder: Path, *rounds: tuple[float, float], whole: tuple[float, float] = (0.7, 0.9), **training: Any
) -> OpenRun:
    """A run with these scores of the two tasks after each round; the last round's training has changes."""

    def quality(pick: float, copy: float, n: int = 400) -> dict[str, Any]:
        scores = {"pick": score(pick, n, chance=0.25), "copy": score(copy, n)}
        aggregate = (pick + copy) / 2
        return {
            "parameters": 9,
            "evaluation": scores,
            "aggregate": aggregate,
            "kept_quality": aggregate / (sum(whole) / 2),
        }

    config = {"teacher": "x", "output": str(folder), "stop": {"target_layers": 2}, "tasks": TASKS}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    start = {"event": "start", "version": 2, "time": 0, "config": config, "process": 1}
    start |= {"teacher_files": {}, "versions": {}, "machine": {}}
    events = [start, {"event": "teacher", "time": 0, "layers": 12, **quality(*whole)}]
    for number, scores in enumerate(rounds, start=1):
        changes = training if number == len(rounds) else {}
        layer_scores = {"metric": "teacher_kl", "importance": {str(12 - number): 0.1}}
        events.append({"event": "scored", "round": number, "removed": 12 - number, "scores": layer_scores})
        events.append(
            {"event": "round", "time": number, "round": number, "training": HEALTHY | changes, "files": {}}
            | {"kept": list(range(12 - number)), **quality(*scores)}
        )
    (folder / "journal.jsonl").unlink(missing_ok=True)
    before = ""
    for event in events:
        before = checksum(event, before)
        append(folder / "journal.jsonl", to_line(event | {"checksum": before}))
    (folder / "journal.jsonl").touch()
    return OpenRun(folder)


def found(run: OpenRun) -> list[tuple[str, str, int | None]]:
    return [(each.check, each.severity, each.round) for each in findings(run)]


def test_a_healthy_run_has_no_findings(tmp_path: Path) -> None:
    assert found(journal(tmp_path, (0.69, 0.89), (0.68, 0.87), (0.66, 0.84), (0.64, 0.8), (0.62, 0.77))) == []


def test_a_run_that_has_not_begun_has_no_findings(tmp_path: Path) -> None:
    run = journal(tmp_path)
    run.events.clear()
    assert findings(run) == []


FLAT = ((0.65, 0.85),)
DYING = ((0.64, 0.82), (0.58, 0.74), (0.52, 0.66), (0.46, 0.58), (0.4, 0.5), (0.33, 0.42), (0.3, 0.4))  # never fast


@pytest.mark.parametrize(
    ("rounds", "changes", "expected"),
    [
        (DYING[:5], {}, []),  # 56 % left
        (DYING, {}, [("under_floor", "error", 6)]),  # said once
        (((0.3, 0.42),) * 3, {}, [("sharp_drop", "warning", 1)]),  # too early for the floor
        (((0.69, 0.89), (0.45, 0.6)), {}, [("sharp_drop", "warning", 2)]),
        (FLAT, {"skipped": 3}, [("not_finite", "warning", 1)]),
        (FLAT, {"skipped": 30, "restarts": 2}, [("not_finite", "warning", 1)]),
        (((0.65, math.nan),), {}, [("not_finite", "error", 1)]),
        (FLAT, {"last_loss": 1.99}, [("no_recovery", "warning", 1)]),
        (FLAT, {"last_loss": 2.5}, [("no_recovery", "warning", 1)]),
        (FLAT, {"last_loss": 2.5, "fall_error": 0.1}, [("no_recovery", "warning", 1)]),
        (FLAT, {"last_loss": 2.5, "fall_error": 0.3}, []),  # it may have fallen
        (FLAT, {"last_loss": 1.99, "steps": 10}, []),  # too few steps to tell
        (((0.7, 0.9),), {"last_loss": 1.99}, []),  # nothing to recover
        (FLAT, {"gradient_norm": 0.0}, [("no_gradient", "error", 1)]),
        (FLAT, {"gradient_norm": 1e-12}, []),
        (FLAT, {"without_gradient": ["hidden_mse"]}, [("idle_loss", "warning", 1)]),
        (FLAT, {"losses": {"kl": [1.0, 0.5], "hidden_mse": [0.0, 0.0]}}, [("idle_loss", "warning", 1)]),
        (FLAT, {"losses": {"kl": [1.0, 0.5], "hidden_mse": [0.1, 0.0]}}, []),
        (
            ((0.69, 0.8), (0.68, 0.7), (0.68, 0.6), (0.68, 0.5), (0.67, 0.42), (0.67, 0.38)),
            {},
            [("copy_collapse", "warning", 5)],
        ),
        (((0.69, 0.8), (0.68, 0.7), (0.68, 0.6), (0.68, 0.5)), {}, []),
    ],
)
def test_signs_of_failure(
    rounds: tuple[tuple[float, float], ...], changes: dict[str, Any], expected: list[Any], tmp_path: Path
) -> None:
    assert found(journal(tmp_path, *rounds, **changes)) == expected


def test_no_training_is_no_failed_training(tmp_path: Path) -> None:
    training = {"steps": 0, "losses": {}} | dict.fromkeys(("first_loss", "last_loss", "gradient_norm"))
    assert found(journal(tmp_path, *FLAT, **training)) == []


def test_a_drop_within_the_noise_is_none(tmp_path: Path) -> None:
    run = journal(tmp_path, (0.6, 0.75))
    assert found(run) == [("sharp_drop", "warning", 1)]
    for event in run.events:
        if isinstance(event, TeacherRecord | RoundEnd):
            for name, value in event.evaluation.scores.items():
                event.evaluation.scores[name] = replace(value, n=10, stderr=0.14)
    assert ("sharp_drop", "warning", 1) not in found(run)


def test_the_absolute_floor_is_the_papers(tmp_path: Path) -> None:
    low = [(pick, 0.27) for pick in (0.33, 0.32, 0.31, 0.3)]  # 0.285 in the end, of 0.335
    assert found(journal(tmp_path, *low, whole=(0.36, 0.31))) == [("under_floor", "warning", 4)]
    assert found(journal(tmp_path, *low, whole=(0.34, 0.25))) == []  # the teacher was there already


@pytest.mark.parametrize(
    ("value", "n", "silent"),
    [(0.25, 400, False), (0.29, 400, False), (0.3, 400, True), (0.4, 20, False), (0.1, 400, False)],
)
def test_a_task_at_chance_is_seen_from_the_start(value: float, n: int, silent: bool, tmp_path: Path) -> None:
    run = journal(tmp_path)
    assert run.teacher
    run.teacher.evaluation.scores["pick"] = TaskScore(**score(value, n, chance=0.25))
    assert found(run) == ([] if silent else [("at_chance", "warning", None)])


@pytest.mark.parametrize("aggregate", ["mean", "relative"])
@pytest.mark.parametrize(("pick", "severity"), [(0.6, "warning"), (0.0, "error")])
def test_a_teacher_that_scores_zero_is_said(pick: float, severity: str, aggregate: str, tmp_path: Path) -> None:
    run = journal(tmp_path)
    assert run.teacher
    scores = run.teacher.evaluation.scores
    scores["pick"], scores["copy"] = TaskScore(**score(pick)), TaskScore(**score(0.0))
    value = run.reference.aggregate(run.reference, aggregate)
    run.events[1] = run.teacher.model_copy(update={"aggregate": value})
    (finding,) = findings(run)
    assert (finding.check, finding.severity, finding.round) == ("at_zero", severity, None)
    said = "task copy: the teacher scores 0 on all 400 rows" if pick else "the teacher scores 0 on all tasks"
    assert finding.message.startswith(said)


def test_findings_are_recorded_and_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = journal(tmp_path, *FLAT, without_gradient=["[red]\x1b[31mkl"], skipped=2)
    note_findings(run)
    said = capsys.readouterr().err
    assert "warning: round 1: loss [red]\\u001b[31mkl does not depend on what trains" in said
    assert said.count("hint:") == 2 and "\x1b" not in said
    written = Run(tmp_path).findings
    assert [(each.check, each.severity, each.round) for each in written] == found(run)
    assert all(each.message and each.hint for each in written)
    note_findings(OpenRun(tmp_path))
    assert not capsys.readouterr().err and len(Run(tmp_path).events) == len(run.events)


class Constant(Loss):
    """A loss that forgot the student."""

    def __call__(self, outputs: StepOutputs) -> Tensor:
        return outputs.teacher_final.new_ones(()) * outputs.mask.sum() / outputs.step_tokens


def test_a_real_run_finds_what_is_wrong_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(f"w{5 + n} w9 w7 w8 w4 w6 " * 4 for n in range(20)))
    rows = [{"context": f"w{3 + n}", "choices": ["w7", "w8", "w9", "w10"], "answer": n % 4} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = peel(
        parse_config(
            {
                "teacher": str(save_tiny(tmp_path / "teacher")),
                "output": str(tmp_path / "run"),
                "stop": {"target_layers": 5},
                "score": {"decide": "block_influence", "tokens": 64},
                "tasks": [
                    {"name": "guess", "kind": "choice", "data": str(tmp_path / "rows.jsonl")},
                    {"kind": "perplexity", "data": str(tmp_path / "text.txt")},
                ],
                "distill": {
                    "text": str(tmp_path / "text.txt"),
                    "tokens_per_round": 640,
                    "tokens_per_step": 32,
                    "sequence_length": 16,
                    "learning_rate": 1e-12,
                    "losses": {"kl": {}, "tests.run.test_health:Constant": {}},
                },
            },
            "test",
        )
    )
    said = capsys.readouterr().err
    kinds = {finding.check for finding in run.findings}
    assert {"at_chance", "idle_loss"} <= kinds
    assert "task guess: the teacher scores" in said and "guessing would score 0.250" in said
    assert run.rounds[0].training.without_gradient == ["tests.run.test_health:Constant"]
    assert (run.rounds[0].training.gradient_norm or 0) > 0
    assert run.rounds[0].training.losses["tests.run.test_health:Constant"] == (pytest.approx(1.0), pytest.approx(1.0))
