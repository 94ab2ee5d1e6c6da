"""On a real GPU: the numbers of a CPU, of an interrupted run, of layers that are read as they run, of full memory.

`tests/fake_cuda` has the same work on a device that is not there; what it cannot have is here: streams, real threads,
kernels of another order, an allocator that is full.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from layerpeel.config.distill import DistillConfig
from layerpeel.config.run import TaskConfig
from layerpeel.config.score import ScoreConfig
from layerpeel.importance.scoring import score_layers
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.loading import load_model
from layerpeel.model.streaming import load_streamed
from layerpeel.run import peeling
from layerpeel.run.folder import Run
from layerpeel.run.loop import peel
from layerpeel.tasks.registry import make_tasks
from layerpeel.training.repairing import repair_student
from layerpeel.training.student import Student
from tests.fake_cuda.work import config_of, numbers_of, run
from tests.families import FAMILIES, save_texts, save_tiny, tiny_ids, tiny_model, tiny_texts, tiny_tokenizer

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    save_texts(folder / "text.jsonl", tiny_texts(3 + 11 * line % 28 for line in range(40)))
    save_texts(folder / "few.jsonl", tiny_texts((9, 12, 9)))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_gives_the_numbers_of_a_cpu(family: str, folder: Path) -> None:
    cpu, cuda = (run(family, "float32", device, folder) for device in ("cpu", "cuda"))
    assert cuda["switches"] == cpu["switches"] and cuda["texts"] == cpu["texts"]
    assert cuda["importance"] == pytest.approx(cpu["importance"], rel=1e-3, abs=1e-5)
    assert cuda["losses"] == pytest.approx(cpu["losses"], rel=1e-3)
    assert cuda["scores"]["perplexity"] == pytest.approx(cpu["scores"]["perplexity"], rel=1e-3)


def same_numbers(one: Run, other: Run, rel: float) -> None:
    ours, theirs = numbers_of(one), numbers_of(other)
    for name, values in ours.items():
        assert values and theirs[name] == pytest.approx(values, rel=rel, abs=1e-6), name


def test_a_run_gives_what_it_gives_on_a_cpu(folder: Path) -> None:
    on_gpu = peel(config_of(folder, "on-gpu", "cuda"))
    same_numbers(peel(config_of(folder, "on-cpu", "cpu")), on_gpu, 2e-3)
    assert on_gpu.start and on_gpu.start.machine.gpus == [torch.cuda.get_device_name()]


def test_a_run_whose_layers_are_read_as_they_run_is_one_in_memory(folder: Path) -> None:
    in_memory = peel(config_of(folder, "in-memory", "cuda"))
    same_numbers(in_memory, peel(config_of(folder, "streamed", "cuda", weights="stream")), 1e-4)


def test_a_run_that_was_stopped_is_one_that_was_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = peel(config_of(folder, "whole", "cuda"))
    train, calls = peeling.train_student, []

    def fails_in_the_second_round(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(peeling, "train_student", fails_in_the_second_round)
        with pytest.raises(KeyboardInterrupt):
            peel(config_of(folder, "stopped", "cuda"))
    assert len(Run(folder / "stopped").rounds) == 1
    same_numbers(whole, peel(config_of(folder, "stopped", "cuda")), 1e-4)


def test_layers_read_ahead_on_a_stream_of_their_own_are_those_of_a_model_in_memory(folder: Path) -> None:
    checkpoint, ids = save_tiny(folder / "streamed"), tiny_ids(8, 64)
    loaded, _ = load_model(checkpoint, device="cuda", dtype="bfloat16")
    expected = LayerwiseModel(loaded).forward_with_skips(ids, (2,))
    streamed, _ = load_streamed(checkpoint, device="cuda", dtype="bfloat16")
    layerwise = LayerwiseModel(streamed.model, streamed.weights_loaded, streamed.drop_read_ahead)
    for _ in range(5):  # a layer that is used before it has arrived would differ in some of them
        assert torch.equal(layerwise.forward_with_skips(ids, (2,)), expected)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A process that may take only some 64 MiB more of the GPU's."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * 2**20) / total)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("little_memory")
def test_a_full_gpu_halves_the_batches_and_changes_no_number(folder: Path) -> None:
    data = save_texts(folder / "many.jsonl", tiny_texts([60] * 10_000))
    tasks = make_tasks([TaskConfig(kind="perplexity", data=str(data))])
    model, tokenizer = tiny_model("llama").to("cuda"), tiny_tokenizer()
    scores = score_layers(model, tokenizer, ScoreConfig(decide="task_quality"), tasks=tasks)
    small = score_layers(model, tokenizer, ScoreConfig(decide="task_quality", memory="4MB"), tasks=tasks)
    assert scores.memory_halved > 0 and not small.memory_halved
    assert scores.importance == pytest.approx(small.importance, rel=1e-3, abs=1e-5)


def test_a_repair_finds_on_a_gpu_what_it_finds_on_a_cpu(folder: Path) -> None:
    config = DistillConfig(
        text=str(folder / "text.jsonl"),
        tokens_per_round=0,
        sequence_length=32,
        repair={"tokens": 512},  # type: ignore[arg-type]
    )
    results = []
    for device in ("cpu", "cuda"):
        student = Student(tiny_model("llama").to(device))
        student.remove([3])
        result = repair_student(student, tiny_tokenizer(), config, [3], seed=0, storage=torch.float32)
        assert result
        results.append([(each.ridge, each.before, each.after) for each in result.projections])
    for ours, theirs in zip(*results, strict=True):
        assert ours[0] == theirs[0] and ours[1:] == pytest.approx(theirs[1:], rel=1e-3)
