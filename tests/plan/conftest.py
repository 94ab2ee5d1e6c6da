"""A teacher to start from, and a device of a speed that is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from layerpeel.plan import quality
from layerpeel.plan.speed import Speed
from tests.families import save_texts, save_tiny

# Of a model of six layers: 1 ms a token in a layer, and nothing else takes time.
SPEED = Speed(1e-3, 1e-3, 0.0, 0.0, 0.0, 1e-3, 0.0, 0.0)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("start") / "teacher")


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the speed that is measured, by dtype; it is `SPEED` at first."""

    def measured(changes: dict[torch.dtype, float] | None = None) -> None:
        def measure(
            _: type[Speed], config: Any, distill: Any, dtype: torch.dtype, device: str, **_options: Any
        ) -> Speed:
            factor = (changes or {}).get(dtype, 1.0)
            return replace(SPEED, layer=factor * SPEED.layer, trained_layer=factor * SPEED.trained_layer)

        monkeypatch.setattr(Speed, "measure", classmethod(measure))

    measured()
    return measured


@pytest.fixture
def local_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two tasks of the harness in files; the first is for any model, the second for those of 1000 parameters."""
    save_texts(tmp_path / "rows.jsonl", ["w5", "w7", "w9"])
    names = []
    for name in ("small", "large"):
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}",
            "doc_to_choice": ["w3", "w4"],
            "doc_to_target": 0,
            "metric_list": [{"metric": "acc"}],
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(task))
        names.append(str(tmp_path / f"{name}.yaml"))
    monkeypatch.setattr(quality, "HARNESS", {names[0]: 0.0, names[1]: 1000.0})
    return names
