"""Every shipped study in a tiny form, and its table against the journals of its runs."""

from __future__ import annotations

import csv
import glob
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from layerpeel.study.file import load_study
from layerpeel.study.writing import Study, run_study

FOLDER = Path(__file__).parents[2] / "studies"
STUDIES, OF_OTHER_MODELS = sorted(FOLDER.glob("*.yaml")), sorted(FOLDER.glob("*/*.yaml"))
SEVEN = {
    "baseline",
    "loss-ablation",
    "single-pass-vs-iterative",
    "kl-scale",
    "dataset-sensitivity",
    "architectures",
    "cost-benefit",
}


def tiny(path: Path, base: Path, output: Path, *overrides: str) -> Study:
    values = [f"base={base}", f"output={output}", "remove=1", "distill.tokens_per_round=32"]
    return run_study(path, [*values, *overrides])


def journal(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def test_there_are_seven() -> None:
    assert {path.stem for path in STUDIES} == SEVEN


@pytest.mark.parametrize("path", OF_OTHER_MODELS, ids=lambda path: path.stem)
def test_a_study_of_another_model_is_read_with_its_data(path: Path, kit: Path, base: Path) -> None:
    variants = yaml.safe_load(path.read_text()).get("variants") or {"base": {}}
    teacher = base.parent / "teacher"
    teachers = [f"variants.{name}.teacher={teacher}" for name, fields in variants.items() if "base" in fields]
    _, jobs = load_study(path, [*(teachers or [f"model={teacher}"]), "remove=1"])
    assert [*dict.fromkeys(job.variant for job in jobs)] == [*variants]
    for job in jobs:
        assert job.config.stop.target_layers == 5 and Path(job.config.teacher) == teacher
        assert all(Path(str(task.data)).resolve().is_relative_to(kit.resolve()) for task in job.config.tasks)
        assert all(glob.glob(str(task.data)) for task in job.config.tasks)


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_shipped_study_says_what_its_journals_say(path: Path, base: Path, tmp_path: Path) -> None:
    seeds = [0, 1] if path.stem == "loss-ablation" else [0]
    study = tiny(path, base, tmp_path, f"seeds={seeds}")
    raw = yaml.safe_load(path.read_text())
    variants = raw.get("variants") or {"base": {}}
    grid = next(iter(raw.get("grid", {}).values()), None)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows == json.loads(json.dumps([row.columns() for row in study.rows.results])) and len(rows) == len(
        grid or variants
    )
    folders = [journal.parent for journal in (tmp_path / "runs").rglob("journal.jsonl")]
    assert len(folders) == len(rows) * len(seeds)
    expected = sorted(_of_journals(folder.parent) for folder in folders if folder.name == "seed-0")
    tabulated = sorted(
        (
            row["aggregate"],
            row["aggregate_ci"] or 0.0,
            row["training_tokens"],
            row["layer_tokens"],
            row["removed_layers"],
        )
        for row in rows
    )
    for shown, recorded in zip(tabulated, expected, strict=True):
        assert shown[:4] == pytest.approx(recorded[:4]) and shown[4] == recorded[4]
    with (tmp_path / "results.csv").open(newline="") as file:
        assert [float(row["aggregate"]) for row in csv.DictReader(file)] == [row["aggregate"] for row in rows]
    for name in ("figure.png", "figure.svg", "tables.md", "index.html", "study.json", "depths.csv"):
        assert (tmp_path / name).stat().st_size > 100


def _of_journals(variant: Path) -> tuple[float, float, float, float, str]:
    """Mean, interval, tokens, layer calls and order of a variant, by code that shares nothing with ours."""
    ends, tokens, calls, orders = [], 0, 0, []
    seeds = sorted(variant.iterdir())
    for folder in seeds:
        events = journal(folder)
        assert [event["event"] for event in events].count("teacher") == 1 and events[-1]["event"] == "finish"
        rounds = [event for event in events if event["event"] == "round"]
        last = events[-1]["last_pass"]
        ends.append((last or rounds[-1])["aggregate"])
        tokens += sum(event["training"]["tokens"] for event in [*rounds, *([last] if last else [])])
        chosen = [event for event in events if event["event"] == "scored"]
        for scores in (event["scores"] for event in chosen):
            calls += scores["layer_tokens"] + scores.get("cheap", {}).get("layer_tokens", 0)
        orders.append(" ".join(str(event["removed"]) for event in chosen))
    half = 12.7062 * abs(ends[0] - ends[-1]) / 2 if len(ends) == 2 else 0.0  # t of one degree of freedom; s / sqrt(2)
    order = " / ".join(dict.fromkeys(orders))
    return sum(ends) / len(ends), half, tokens / len(seeds), calls / len(seeds), order
