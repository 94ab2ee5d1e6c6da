"""Healing on trial: the choice by what tasks say after a short distillation, and what the journal says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerpeel.config.reading import parse_config
from layerpeel.model.loading import load_model
from layerpeel.run.loop import peel
from layerpeel.tasks.evaluation import evaluate
from layerpeel.tasks.registry import make_tasks
from layerpeel.training.rounds import distill
from tests.families import save_texts, save_tiny


def test_the_best_few_are_healed_before_the_choice(tmp_path: Path) -> None:
    text = str(save_texts(tmp_path / "text.jsonl"))
    settings = {
        "teacher": str(save_tiny(tmp_path / "teacher")),
        "output": str(tmp_path / "run"),
        "stop": {"target_layers": 5},
        "score": {"heal": {"keep": 3, "steps": 4}},
        "tasks": [{"kind": "perplexity", "data": text, "limit": 5}],
        "distill": {
            "text": text,
            "tokens_per_round": 0,
            "tokens_per_step": 64,
            "sequence_length": 16,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "repair": False,
        },
    }
    config = parse_config(settings, "test")
    run = peel(config)
    (event,) = run.rounds
    scores = event.scores
    first = sorted(scores.importance, key=lambda layer: (scores.importance[layer], layer))[:3]
    assert set(scores.healed) == set(first) and scores.heal_seconds > 0
    assert event.removed == min(scores.healed, key=lambda layer: (scores.healed[layer], layer))
    teacher, tokenizer = load_model(config.teacher)
    tasks, trial = make_tasks(config.tasks), config.distill.model_copy(update={"tokens_per_round": 4 * 64})
    for layer, lost in scores.healed.items():
        student, result = distill(teacher, tokenizer, [layer], trial, seed=config.seed)
        assert result.steps == 4
        quality = evaluate(student, tokenizer, tasks).aggregate(run.reference)
        assert lost == pytest.approx(run.reference.aggregate(run.reference) - quality, abs=1e-6)
    assert any(scores.healed[layer] != scores.importance[layer] for layer in first)
