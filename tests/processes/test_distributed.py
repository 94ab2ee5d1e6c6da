"""Without a launcher a process is alone, and the main one; several are in tests/training/test_parallel.py."""

from __future__ import annotations

import os
import runpy
from datetime import timedelta

import pytest
import torch

from layerpeel.processes import distributed
from layerpeel.processes.distributed import from_main, gather, is_main_process, processes_of, sum_numbers


def test_a_process_without_a_launcher_is_alone() -> None:
    cpu = torch.device("cpu")
    assert is_main_process() and processes_of(cpu).num_processes == 1 and processes_of(cpu).process_index == 0
    assert gather({"answers": [1, 2]}) == [{"answers": [1, 2]}]
    assert from_main(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        from_main(lambda: 1 // 0)
    assert sum_numbers({"loss": 0.1, "tokens": 3.0}, cpu) == {"loss": 0.1, "tokens": 3.0}


def test_each_process_loads_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")  # as `accelerate launch --use_fsdp` does
    processes_of(torch.device("cpu"))
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 0, True)),
        ({"RANK": "0", "LOCAL_RANK": "0"}, (0, 0, True)),
        ({"RANK": "5", "LOCAL_RANK": "1"}, (5, 1, False)),
        ({"RANK": "first", "LOCAL_RANK": ""}, (0, 0, True)),  # `check_launcher` says what is wrong
    ],
)
def test_ranks_are_those_that_the_launcher_set(
    environment: dict[str, str], expected: tuple[int, int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    module = runpy.run_path(distributed.__file__)
    assert (module["RANK"], module["LOCAL_RANK"], module["is_main_process"]()) == expected


def test_processes_wait_for_one_another_longer_than_a_large_save_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    monkeypatch.setattr("accelerate.PartialState", lambda **options: asked.update(options))
    processes_of(torch.device("cuda"))
    assert asked == {"cpu": False, "timeout": timedelta(hours=3)}
