"""The work that is done on the CPU, on the fake CUDA device and on a real one.

Nothing here knows the fake device: a process that does can have no real one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from layerpeel.config.distill import DistillConfig
from layerpeel.config.fields import TextConfig
from layerpeel.config.reading import parse_config
from layerpeel.config.run import RunConfig, TaskConfig
from layerpeel.config.score import ProtectConfig, ScoreConfig, ShortlistConfig
from layerpeel.data.batches import load_rows
from layerpeel.importance.scoring import score_layers
from layerpeel.inference.engine import Engine
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.requests import Generation
from layerpeel.run.folder import Run
from layerpeel.tasks.evaluation import evaluate
from layerpeel.tasks.registry import make_tasks
from layerpeel.training.rounds import train_student
from layerpeel.training.student import Student
from tests.families import save_tiny, tiny_ids, tiny_model, tiny_tokenizer

NEW = 4  # tokens of a generation
LOSSES: dict[str, Any] = {"kl": {}, "hidden_mse": {}, "cross_entropy": {"weight": 0.1}}


def run(family: str, dtype: str, device: str, folder: Path) -> dict[str, Any]:
    """Scores a model, trains a student without one layer, and evaluates it; gives numbers, texts and switches."""
    model, tokenizer = tiny_model(family).to(getattr(torch, dtype)).to(device), tiny_tokenizer()
    layerwise = LayerwiseModel(model)
    data: dict[str, Any] = {"data": str(folder / "few.jsonl")}
    write = {"prompt": "{text}", "target": "w3 w4", "metric": "copy", "max_new_tokens": NEW}
    tasks = make_tasks([TaskConfig(kind="perplexity", **data), TaskConfig(kind="generate", **data, **write)])
    text = load_rows([TextConfig(path=str(folder / "text.jsonl"))], tokenizer, sequence_length=32, max_tokens=96)
    config = ScoreConfig(protect=ProtectConfig(first=2, last=2), shortlist=ShortlistConfig(keep=1))
    scores = score_layers(layerwise, tokenizer, config, tasks=tasks[:1], text=text)
    assert scores.cheap
    prompts = [Generation(tuple(row.tolist()), NEW, ("w5",)) for row in tiny_ids(2, 9)]
    answers = Engine(layerwise, tokenizer, (2,)).answer(prompts)
    student, losses = train(model, folder)
    evaluation = evaluate(student.model, tokenizer, tasks)
    importance = {**scores.cheap.importance, **{f"decide {n}": value for n, value in scores.importance.items()}}
    return {
        "switches": [layerwise.runs_trees, layerwise.runs_packed],
        "importance": {str(layer): value for layer, value in importance.items()},
        "losses": losses,
        "scores": {name: score.value for name, score in evaluation.scores.items()},
        "texts": answers,
    }


def train(model: Any, folder: Path, after_step: Callable[[], None] = lambda: None) -> tuple[Student, list[float]]:
    """Trains a student without layer 3 for a few steps of one micro-batch each."""
    student, losses = Student(model), []

    def log(point: dict[str, float]) -> None:
        losses.append(point["loss"])
        after_step()

    student.remove([3])
    config = DistillConfig(
        text=str(folder / "text.jsonl"),
        tokens_per_round=2 * 4 * 32,
        tokens_per_step=4 * 32,
        repair=False,
        sequence_length=32,
        batch_size=4,
        losses=LOSSES,
        learning_rate=1e-3,
        warmup_steps=0,
        train="neighbours",
    )
    train_student(student, tiny_tokenizer(), config, log=log, storage=torch.float32)
    return student, losses


def config_of(folder: Path, name: str, device: str, weights: str = "memory") -> RunConfig:
    """Of a run of two rounds, with everything that a round has."""
    fields = {
        "teacher": str(save_tiny(folder / "teacher")),
        "output": str(folder / name),
        "device": device,
        "dtype": "float32",
        "stop": {"target_layers": 4},
        "score": {"decide": "teacher_kl", "tokens": 64, "weights": weights},
        "tasks": [{"kind": "perplexity", "data": str(folder / "few.jsonl")}],
        "distill": {
            "text": str(folder / "text.jsonl"),
            "tokens_per_round": 256,
            "tokens_per_step": 64,
            "sequence_length": 32,
            "learning_rate": 1e-3,
            "train": "neighbours",
            "repair": {"tokens": 256, "ridge": 0.1},
            "weights": weights,
        },
    }
    return parse_config(fields, "a test")


def numbers_of(run: Run) -> dict[str, list[float]]:
    """What a run scored, lost, repaired and measured."""
    return {
        "importance": [value for each in run.rounds for _, value in sorted(each.scores.importance.items())],
        "losses": [loss for each in run.rounds for loss in (each.training.first_loss, each.training.last_loss)],
        "errors": [every.after for each in run.rounds if each.repair for every in each.repair.projections],
        "perplexities": [score.value for each in run.rounds for score in each.evaluation.scores.values()],
    }
