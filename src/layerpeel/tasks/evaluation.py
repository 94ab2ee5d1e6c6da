"""Scores of a model, and of each candidate, on all tasks."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.inference.engine import Engine
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.requests import Answer
from layerpeel.tasks.base import Sample, Task
from layerpeel.tasks.scores import Evaluation, TaskScore


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]) -> Evaluation:
    """Scores a model on tasks.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        tasks: what `make_tasks` gives.
    """
    return Evaluation(score_tasks(Engine(LayerwiseModel(model), tokenizer), tasks)[0])


def score_tasks(engine: Engine, tasks: Sequence[Task]) -> list[dict[str, TaskScore]]:
    """Scores each task on each branch.

    Returns:
        1 + C dicts from task name to score.
    """
    by_branch: list[dict[str, TaskScore]] = [{} for _ in range(engine.branches)]
    for task in tasks:
        samples = task.samples(engine.tokenizer)
        for scores, answers in zip(by_branch, answer_samples(engine, samples, task.name), strict=True):
            scores[task.name] = task.score(samples, answers)
    return by_branch


def answer_samples(engine: Engine, samples: Sequence[Sample], description: str) -> list[list[list[Answer]]]:
    """The answers to each sample's requests on each branch, [1 + C][samples][requests of the sample]."""
    by_branch = []
    for answers in engine.answer([request for sample in samples for request in sample.requests], description):
        rest = iter(answers)
        by_branch.append([[next(rest) for _ in sample.requests] for sample in samples])
    return by_branch
