"""The short form of `make faults`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = ("--kills", "5", "--disks", "2", "--flips", "6")


@pytest.mark.slow
def test_runs_that_are_killed_filled_up_and_damaged_end_as_if_they_were_not() -> None:
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.faults", "--tiny", *SHORT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout, done.stderr[-3000:]
    said = json.loads(done.stdout)
    assert said["failures"] == [] and said["kills"]["kills"] == 5 and sum(said["flips"].values()) == 6
    if isinstance(said["disks"], str):
        pytest.skip(f"all but the full disk was tried ({said['disks']})")
