"""A teacher to start from, and a device of a speed that is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from layerpeel.plan.speed import Speed
from tests.families import save_tiny

# Of a model of six layers: 1 ms a token in a layer, and nothing else takes time.
SPEED = Speed(1e-3, 1e-3, 0.0, 0.0, 0.0, 1e-3, 0.0)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("start") / "teacher")


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the speed that is measured, by dtype; it is `SPEED` at first."""

    def measured(changes: dict[torch.dtype, float] | None = None) -> None:
        def measure(_: type[Speed], config: Any, distill: Any, dtype: torch.dtype, device: str) -> Speed:
            factor = (changes or {}).get(dtype, 1.0)
            return replace(SPEED, layer=factor * SPEED.layer, trained_layer=factor * SPEED.trained_layer)

        monkeypatch.setattr(Speed, "measure", classmethod(measure))

    measured()
    return measured
