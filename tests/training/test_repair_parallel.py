"""Two processes (gloo, on this machine) repair the student of one, and go on after both were killed."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from layerpeel.training.repair_states import RepairState
from tests.launching import launch
from tests.training.test_repair import repaired, write_text


def _worker(folder: Path, dies_after: int = 0) -> None:
    """What each of the processes runs; both end at once, as if killed, after so many layers."""
    from layerpeel.processes.distributed import RANK

    save, left = RepairState.save, [dies_after]

    def saved(*arguments: Any) -> None:
        save(*arguments)
        left[0] -= 1
        if not left[0]:
            torch.distributed.barrier()  # what the main process writes is there
            os._exit(9)

    RepairState.save = saved  # type: ignore[method-assign]
    student, result = repaired(folder / "text.jsonl", state=RepairState(folder / "state", "this repair"))
    if not RANK:
        save_file(student.trained_state(), folder / "repaired.safetensors")
        (folder / "result.json").write_text(json.dumps(asdict(result)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_repair_the_student_of_one(tmp_path: Path) -> None:
    student, alone = repaired(write_text(tmp_path / "text.jsonl"))
    launch("-m", "tests.training.test_repair_parallel", str(tmp_path), "2", dies=True)
    assert len(list((tmp_path / "state").glob("*.safetensors"))) == 2
    launch("-m", "tests.training.test_repair_parallel", str(tmp_path), "0")
    weights, result = load_file(tmp_path / "repaired.safetensors"), json.loads((tmp_path / "result.json").read_text())
    assert result["tokens"] == alone.tokens
    for ours, theirs in zip(alone.projections, result["projections"], strict=True):
        assert ours.ridge == theirs["ridge"] and ours.after == pytest.approx(theirs["after"], rel=1e-4)
    trained = student.trained_state()
    assert trained.keys() == weights.keys()
    for name, value in trained.items():
        assert (value - weights[name]).norm() <= 1e-3 * value.norm(), name


if __name__ == "__main__":
    _worker(Path(sys.argv[1]), int(sys.argv[2]))
