"""What a plan says that a run reads from the disk is what the run reads."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from layerpeel.config.reading import parse_config
from layerpeel.config.run import RunConfig
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.streaming import StreamedLayers, lacks_weights
from layerpeel.plan import reading
from layerpeel.plan.machine import Planner
from layerpeel.plan.planning import Plan
from layerpeel.plan.reading import DISK, seconds_to_read
from layerpeel.run import peeling
from layerpeel.run.loop import peel
from layerpeel.run.preflight import check_plan
from tests.model.test_streaming import saved
from tests.run.test_streamed_run import STREAM, merged, settings

STAGES = {
    "score_candidates": "scoring",
    "evaluate": "evaluation",
    "repair_student": "repair",
    "train_student": "training",
}


def config_of(folder: Path, **changes: Any) -> RunConfig:
    """A run of one round, in which the third of six layers goes, as plans take it to."""
    text = folder / "many.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} words " * 25}) + "\n" for n in range(90)))
    one = {
        "stop": {"target_layers": 5},
        "score": {"protect": {"layers": [0, 1, 3, 4, 5]}},
        "tasks": [{"kind": "perplexity", "data": str(text)}],
        "distill": {"text": str(text), "tokens_per_round": 2048},
    }
    sections = settings(folder)
    for each in (STREAM, one, changes):
        sections = merged(sections, each)
    return parse_config(sections, "test")


def plan_of(config: RunConfig, *, timed: bool = False, **options: Any) -> Plan:
    planner = Planner(config, **options)
    return planner.plan(config, [task.requests(planner.tokenizer) for task in check_plan(config)], timed=timed)


def planned_reads(config: RunConfig, **options: Any) -> dict[str, float]:
    """How many layers each part reads, by a plan."""
    planned = plan_of(config, **options)
    layer = planned.shape.layer_parameters * planned.shape.itemsize
    return {part: size / layer for part, size in planned.read.items() if part in STAGES.values()}


def counted_reads(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many layers each stage of a run asks for that are not in memory, but for those that are tried or copied."""
    reads: Counter[str] = Counter()
    stage = ["before"]
    load = StreamedLayers.weights_loaded

    @contextmanager
    def counted(self: StreamedLayers, position: int) -> Iterator[None]:
        reads[stage[-1]] += lacks_weights(self._architecture.layers[position])
        with load(self, position):
            yield

    def within(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def staged(*args: Any, **options: Any) -> Any:
            stage.append(name)
            try:
                return run(*args, **options)
            finally:
                stage.pop()

        return staged

    monkeypatch.setattr(StreamedLayers, "weights_loaded", counted)
    monkeypatch.setattr(LayerwiseModel, "runs_trees", False)
    monkeypatch.setattr(LayerwiseModel, "runs_packed", True)
    for function, name in STAGES.items():
        monkeypatch.setattr(peeling, function, within(name, getattr(peeling, function)))
    peel(config)
    return reads


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"score": {"decide": "repaired_kl"}},
        {"score": {"decide": "block_influence", "tokens": 2000, "memory": 2**20}},
        {"score": {"decide": "task_quality", "memory": 2**22}, "distill": {"train": r"layers\.5\."}},
        {"distill": {"batch_size": 1, "tokens_per_step": 32, "repair": False}},
    ],
    ids=str,
)
def test_layers_that_are_read(changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, **changes)
    planned, counted = planned_reads(config), counted_reads(config, monkeypatch)
    assert counted["training"] > 0
    for part, reads in planned.items():
        tolerance = 0.3 if part == "scoring" else 0.1  # rows of tasks are taken to be padded
        assert reads == pytest.approx(counted[part], rel=tolerance, abs=3), (part, planned, counted)


def test_only_a_streamed_run_reads_while_it_runs(tmp_path: Path) -> None:
    memory = {"score": {"weights": "memory"}, "distill": {"weights": "memory"}}
    assert not any(planned_reads(config_of(tmp_path, **memory)).values())


def test_the_longer_of_reading_and_computing_counts(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    fast, slow = (plan_of(config, timed=True, flops=1e9, bandwidth=1e9, disk=disk) for disk in (1e30, 1.0))
    for part in STAGES.values():
        assert slow.seconds[part] == pytest.approx(slow.read[part]) and 0 < fast.seconds[part] < slow.seconds[part]


@pytest.mark.parametrize("fits", [True, False])
def test_reading_is_timed_as_it_will_be(fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that memory has room for is read twice, and a larger one is dropped from the cache before."""
    teacher, done = saved(tmp_path / "teacher", "llama", tied=True), []
    read = reading.read_tensors
    monkeypatch.setattr(reading, "read_tensors", lambda *args: (done.append("read"), read(*args))[1])
    monkeypatch.setattr(reading, "_forget", lambda files: done.append("forget"))
    available = 10**12 if fits else 10
    monkeypatch.setattr(reading.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    assert 0 < seconds_to_read(str(teacher), None, torch.float32) < 1e-3
    assert done == (["read", "read"] if fits else ["forget", "read"])


def test_a_checkpoint_that_is_not_here_is_taken_to_be_on_a_common_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert seconds_to_read("nobody/nothing-of-the-kind", None, torch.bfloat16) == 2 / DISK
    snapshot = saved(tmp_path / "snapshot", "llama", tied=True)
    monkeypatch.setattr(reading, "try_to_load_from_cache", lambda *_, **__: str(snapshot / "config.json"))
    assert seconds_to_read("somebody/something", None, torch.bfloat16) != 2 / DISK
    (snapshot / "model.safetensors").unlink()  # only its config has been fetched
    assert seconds_to_read("somebody/something", None, torch.bfloat16) == 2 / DISK


def test_where_layers_are_split_they_are_read_once_a_training(tmp_path: Path) -> None:
    config = config_of(tmp_path)

    def training(gpus: int, fsdp: bool) -> float:
        return planned_reads(config, gpus=gpus, fsdp=fsdp)["training"]

    assert training(2, True) == 2 * 6  # each process reads all six layers, and keeps its part
    assert training(2, False) == 2 * training(1, False) > 100  # for half of each step's rows


def test_a_file_that_is_dropped_from_the_cache_stays(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    reading._forget({file})
    assert file.read_bytes() == b"content"
