"""Scores of a model, and of each candidate, on all tasks."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.inference.engine import Engine
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.requests import Answer, Request
from layerpeel.tasks.base import Task
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
    """Scores each task on each stream.

    Returns:
        1 + C dicts from task name to score.
    """
    streams: list[dict[str, TaskScore]] = [{} for _ in range(engine.streams)]
    for task in tasks:
        samples = task.requests(engine.tokenizer)
        for stream, own in zip(streams, answer_samples(engine, dict(enumerate(samples)), task.name), strict=True):
            stream[task.name] = task.score(own)
    return streams


def answer_samples(
    engine: Engine, samples: dict[int, list[Request]], description: str
) -> list[dict[int, list[Answer]]]:
    """The answers to each sample's requests, on each stream."""
    flat = engine.answer([request for own in samples.values() for request in own], description)
    streams: list[dict[int, list[Answer]]] = []
    for answers in flat:
        rest = iter(answers)
        streams.append({sample: [next(rest) for _ in own] for sample, own in samples.items()})
    return streams
