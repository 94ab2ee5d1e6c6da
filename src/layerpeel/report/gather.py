"""What a report says of a run, gathered from its journal and files, as plain values."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from layerpeel.config.run import RunConfig
from layerpeel.errors import InputError
from layerpeel.model.checkpoint import stored_dtype
from layerpeel.run.folder import Run
from layerpeel.tasks.scores import Evaluation, aggregate_stderr

REASONS = {
    "target_layers": "the target depth was reached",
    "max_params": "the target size was reached",
    "min_quality": "the next removal went below the quality floor",
    "no_candidates": "no layer was left that may go",
}


Row = dict[str, Any]


def depth_rows(run: Run) -> list[Row]:
    """A row for the teacher, one for each round, and one for the last pass, if there was one: what to choose from."""
    if not run.teacher:
        return []
    each = bytes_per_parameter(run)
    events = [run.teacher | {"round": 0, "removed": None, "kept": range(run.teacher["layers"])}, *run.rounds]
    rows = [_depth_row(run, event, each) for event in events]
    if last := last_pass(run):
        rows.append(_depth_row(run, events[result_round(run)] | last, each) | {"last_pass": True})
    return rows


def last_pass(run: Run) -> dict[str, Any] | None:
    """What the training after the last removal did, if there was one."""
    return run.finish.get("last_pass") if run.finish else None


def result_row(rows: Sequence[Row], run: Run) -> int:
    """The row of the run's result, or of the last round while it goes on."""
    return max(index for index, row in enumerate(rows) if row["round"] == result_round(run))


def _depth_row(run: Run, event: dict[str, Any], bytes_each: float | None) -> Row:
    assert run.teacher
    evaluation = Evaluation.from_json(event["evaluation"])
    return {
        "round": event["round"],
        "removed": event["removed"],
        "last_pass": False,
        "layers": len(event["kept"]),
        "parameters": event["parameters"],
        "parameters_kept": event["parameters"] / run.teacher["parameters"],
        "bytes": None if bytes_each is None else round(bytes_each * event["parameters"]),
        "aggregate": event["aggregate"],
        "aggregate_stderr": aggregate_stderr(evaluation, run.reference, run.config.aggregate),
        "kept_quality": event["kept_quality"],
        "tasks": event["evaluation"],
    }


def bytes_per_parameter(run: Run) -> float | None:
    """Of a checkpoint on disk, by the student's files; before there are any, by the teacher's dtype if it is here."""
    files = student_files(run)
    if files and run.finish and run.teacher:
        events = [run.teacher, *run.rounds]
        return sum(file.stat().st_size for file in files) / events[run.finish["round"]]["parameters"]
    if not Path(run.config.teacher).is_dir():
        return None
    try:
        return float(stored_dtype(run.config.teacher).itemsize)
    except InputError:
        return None


def student_files(run: Run) -> list[Path]:
    return sorted(run.student_folder.glob("*.safetensors"))


def result_round(run: Run) -> int:
    """The round whose student is the result; the last one while the run goes on."""
    return run.finish["round"] if run.finish else len(run.rounds)


def task_kept(run: Run) -> dict[str, list[float | None]]:
    """For each task, its quality as a share of the teacher's at each depth (None where the teacher's is 0)."""
    if not run.teacher:
        return {}
    whole = run.reference.qualities(run.reference)
    shares: dict[str, list[float | None]] = {name: [] for name in whole}
    for event in [run.teacher, *run.rounds]:
        for name, value in Evaluation.from_json(event["evaluation"]).qualities(run.reference).items():
            shares[name].append(value / whole[name] if whole[name] else None)
    return shares


def importance_rows(run: Run) -> list[Row]:
    """Every score of every round: by the deciding metric, and by the one that made the shortlist."""
    return [
        {
            "round": event["round"],
            "layer": int(layer),
            "metric": scores["metric"],
            "role": role,
            "importance": value,
            "stderr": scores.get("stderr", {}).get(layer),
            "after_healing": scores.get("healed", {}).get(layer),
            "removed": int(layer) == event["removed"],
        }
        for event in run.rounds
        for role, scores in _scorings(event["scores"])
        for layer, value in scores["importance"].items()
    ]


def _scorings(scores: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "decides", scores
    if scores.get("cheap"):
        yield "shortlist", scores["cheap"]


def removal_rows(run: Run) -> list[Row]:
    """Which layers went, in order, and what was known of each when it was chosen."""
    rows = []
    for event in run.rounds:
        scores, layer = event["scores"], str(event["removed"])
        rows.append(
            {
                "round": event["round"],
                "removed": event["removed"],
                "metric": scores["metric"],
                "importance": scores["importance"].get(layer),
                "stderr": scores.get("stderr", {}).get(layer),
                "candidates": len(scores.get("cheap", scores)["importance"]),
                "scored": len(scores["importance"]),
                "cheap_chooses_same": scores.get("cheap_chooses_same"),
            }
        )
    return rows


def cost_rows(run: Run) -> list[Row]:
    """What each round took in seconds, and what it lost."""
    if not run.teacher:
        return []
    rows, before = [], run.teacher["aggregate"]
    for event in run.rounds:
        scores, training = event["scores"], event["training"]
        rows.append(
            {
                "round": event["round"],
                "removed": event["removed"],
                "scoring_seconds": scores["seconds"] + scores.get("cheap", {}).get("seconds", 0.0),
                "healing_seconds": scores.get("heal_seconds", 0.0),
                "training_seconds": training["seconds"],
                "training_tokens": training["tokens"],
                "first_loss": training.get("first_loss"),
                "last_loss": training.get("last_loss"),
                "aggregate_lost": before - event["aggregate"],
            }
        )
        before = event["aggregate"]
    return rows


def seconds_of(run: Run) -> dict[str, float]:
    """What scoring (healing on trial included) and training took in all."""
    rows, last = cost_rows(run), last_pass(run)
    training = sum(row["training_seconds"] for row in rows) + (last["training"]["seconds"] if last else 0.0)
    return {"scoring": sum(row["scoring_seconds"] + row["healing_seconds"] for row in rows), "training": training}


def training_curves(run: Run) -> dict[int, list[dict[str, float]]]:
    """For each round that trained, its curve; rounds whose file is gone or damaged are left out."""
    curves = {}
    for event in run.rounds:
        if curve := run.curve(event):
            curves[event["round"]] = curve
    return curves


def state_of(run: Run) -> tuple[str, str]:
    """running, finished or interrupted, and a word more."""
    if run.finish:
        return "finished", REASONS.get(run.finish["reason"], run.finish["reason"])
    if run.is_running:
        return "running", f"round {len(run.rounds) + 1}"
    return "interrupted", "run the same command again to go on"


def method_of(config: RunConfig) -> str:
    """How a run works, in a few words."""
    tokens, every = config.distill.tokens_per_round, config.score.every
    ranked = {0: ", ranked once", 1: ""}.get(every, f", ranked every {every} rounds")
    when = "a round" if config.distill.when == "each_round" else "a removal, at the end"
    return config.score.decide + ranked + (f", {tokens:,} tokens {when}" if tokens else ", no training")


def names_of(runs: Sequence[Run]) -> list[str]:
    """The shortest ends of the runs' paths that tell them apart."""
    paths = [run.folder.absolute().parts for run in runs]
    longest = max(map(len, paths))
    for length in range(1, longest + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def hashes(run: Run) -> dict[str, str]:
    """SHA-256 of each of the student's safetensors files."""
    found = {}
    for path in student_files(run):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def command_of(run: Run) -> str:
    """What to type to run it again, into another folder."""
    again = run.folder.with_name(f"{run.folder.name}-again")
    return shlex.join(["layerpeel", "run", str(run.folder / "config.yaml"), "--set", f"output={again}"])
