"""The file that keeps measurements."""

from __future__ import annotations

from pathlib import Path

from layerpeel.report.measurements import (
    DepthSpeed,
    Measurements,
    MeasureSetup,
    Sample,
    measurements_path,
    read_measurements,
    write_measurements,
)
from layerpeel.run.events import Machine


def test_what_was_written_is_read(tmp_path: Path) -> None:
    measured = Measurements(
        MeasureSetup(64, 32, 8, 5, "cpu", "float32"),
        Machine(system="an OS", cores=2),
        {0: DepthSpeed(2.0, 1.5, 3.0, 900.0, 10**9), 1: DepthSpeed(1.0, 0.5, 2.0, 1800.0, 10**8)},
        [Sample("text", "Однажды", {0: "a", 1: "b"})],
    )
    path = measurements_path(tmp_path)
    assert read_measurements(path) is None
    write_measurements(path, measured)
    assert read_measurements(path) == measured
    path.write_bytes(path.read_bytes()[:100])
    assert read_measurements(path) is None  # so that it is measured again
