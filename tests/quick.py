"""Measurements that take a moment; in earnest they take seconds."""

from __future__ import annotations

import pytest

QUICK = {
    "report.measure": {"TURN_SECONDS": 0.0, "REPEATS": 1, "NEW": 2, "SAMPLE_TOKENS": 8},
    "plan.speed": {"LEAST_SECONDS": 0.0, "REPEATS": 1},
}


def measure_quickly(patch: pytest.MonkeyPatch) -> None:
    """Reports time and sample their students for a moment, and plans their machine."""
    for module, values in QUICK.items():
        for name, value in values.items():
            patch.setattr(f"layerpeel.{module}.{name}", value)
