"""Training with frozen layers that stay on the disk gives what training in memory gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from layerpeel.config.distill import DistillConfig
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.loading import load_model
from layerpeel.model.streaming import StreamedLayers, lacks_weights, load_streamed
from layerpeel.training.repair_states import RepairState
from layerpeel.training.repairing import repair_student
from layerpeel.training.result import TrainingResult
from layerpeel.training.rounds import train_student
from layerpeel.training.student import Student
from tests.families import FAMILIES, UNLISTED, save_texts
from tests.model.test_streaming import saved

REMOVED = [1, 4]


def train(folder: Path, *, stream: bool, repair: bool = False, **fields: Any) -> tuple[Student, TrainingResult]:
    """Trains a student of the model in a folder on the text beside it, a few steps."""
    dtype = fields.pop("dtype", "float32")
    if stream:
        files, tokenizer = load_streamed(folder, device="cpu", dtype=dtype)
        student = Student(LayerwiseModel(files.model, files.weights_loaded))
    else:
        model, tokenizer = load_model(folder, device="cpu", dtype=dtype)
        student = Student(model)
    student.remove(REMOVED)
    values = {"text": str(save_texts(folder / "text.jsonl")), "sequence_length": 32, "tokens_per_round": 384}
    values |= {"tokens_per_step": 96, "batch_size": 2, "learning_rate": 1e-2, "warmup_steps": 1}
    config = DistillConfig(**(values | fields))
    options: dict[str, Any] = {"storage": student.model.dtype}
    if repair:
        state = RepairState(folder / "solved", "test")
        repair_student(student, tokenizer, config, REMOVED, state=state, required=True, **options)
    return student, train_student(student, tokenizer, config, **options)


def both_ways(folder: Path, **fields: Any) -> None:
    student, result = train(folder, stream=False, **fields)
    streamed, other = train(folder, stream=True, **fields)
    assert other.curve == result.curve and len(result.curve) == 4
    trained = streamed.trained_state()
    assert trained and all(torch.equal(value, student.trained_state()[name]) for name, value in trained.items())
    of_layers = {name: value for name, value in streamed.parameters().items() if streamed.layer_of(name) is not None}
    assert {name for name, value in of_layers.items() if not value.is_meta} == set(trained) & set(of_layers)
    assert all(parameter.is_meta for parameter in streamed.teacher.layers.parameters())


@pytest.mark.parametrize("family", [*FAMILIES, *UNLISTED])
def test_streamed_training_is_that_in_memory(family: str, tmp_path: Path) -> None:
    both_ways(saved(tmp_path, family, tied=True), train="neighbours")


@pytest.mark.parametrize(
    "fields",
    [
        {"train": "all"},
        {"train": "above", "losses": {"kl": {}, "hidden_mse": {"layers": "all"}}},
        {"train": r"layers\.[25]\.mlp\.down_proj"},  # of layers whose rest is frozen
        {"train": "neighbours", "train_norm": True, "activation_checkpointing": True},
        {"train": "neighbours", "dtype": "bfloat16"},
        {"train": "neighbours", "repair": True},  # repaired layers are read from where the repair keeps them
        {"train": r"layers\.5\.", "repair": True, "packing": "none"},
    ],
    ids=lambda fields: "-".join(map(str, fields.values()))[:40],
)
def test_whatever_trains(fields: dict[str, Any], tmp_path: Path) -> None:
    both_ways(saved(tmp_path, "llama", tied=False), **fields)


def test_an_embedding_that_trains_with_the_head(tmp_path: Path) -> None:
    both_ways(saved(tmp_path, "llama", tied=True), train="neighbours", train_head=True)


def test_no_more_than_a_layer_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each model, at any time; and in a backward pass the layer below is what is read ahead."""
    load, most, misses = StreamedLayers.weights_loaded, [], []

    @contextmanager
    def watched(layers: StreamedLayers, position: int) -> Iterator[None]:
        absent = lacks_weights(layers_of(layers)[position])
        misses.append(absent and position not in layers._read_ahead)
        with load(layers, position):
            most.append(sum(not next(layer.parameters()).is_meta for layer in layers_of(layers)))
            yield

    def layers_of(layers: StreamedLayers) -> Any:
        return layers._architecture.layers

    monkeypatch.setattr(StreamedLayers, "weights_loaded", watched)
    train(saved(tmp_path, "llama", tied=True), stream=True, train=r"layers\.5\.", batch_size=3)
    assert max(most) == 1
    # Where a walk turns, after the last layer and in a step's beginning, and over the gap on the way back.
    assert sum(misses) <= 4 * 4 + 2 < sum(not miss for miss in misses)
