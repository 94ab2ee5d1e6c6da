"""Trackers start in any launcher's environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerpeel.config.run import RunConfig
from layerpeel.run.tracking import Tracker


def test_trackers_start_under_fsdp_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    task = {"kind": "perplexity", "data": "text.jsonl"}
    config = RunConfig.model_validate(
        {"teacher": "t", "output": "o", "stop": {"target_layers": 1}, "tasks": [task], "trackers": ["tensorboard"]}
    )
    tracker = Tracker(config, tmp_path, step=5)
    for loss in (2.0, 1.0):
        tracker.log({"loss": loss})
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.*")}
    points = accumulator.EventAccumulator(str(folder)).Reload().Scalars("loss")
    assert [(point.step, point.value) for point in points] == [(5, 2.0), (6, 1.0)]


def test_no_tracker_is_started_where_none_is_named(tmp_path: Path) -> None:
    task = {"kind": "perplexity", "data": "text.jsonl"}
    config = RunConfig.model_validate({"teacher": "t", "output": "o", "stop": {"target_layers": 1}, "tasks": [task]})
    Tracker(config, tmp_path, step=0).log({"loss": 1.0})
    assert not list(tmp_path.iterdir())
