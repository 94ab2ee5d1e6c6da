"""Counts the tokens and layer calls that a metric needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerpeel.importance.base import Metric, ScoringInputs
from layerpeel.inference.requests import Generation, LogLikelihood, Request


@dataclass(frozen=True)
class Work:
    """An upper bound: racing, and generated text that ends early, take less.

    Attributes:
        tokens: of the text or the tasks, including those to be generated.
        layer_runs: layer calls for each token of text, contexts and continuations, over all candidates.
        one_by_one: the same if each candidate were removed and run by itself.
        layer_tokens: token-layer pairs, over all layers and branches.
        decoded_layer_tokens: those of `layer_tokens` that are run one token at a time, in generation.
        head_tokens: tokens that go through the head, over all branches.
    """

    tokens: int
    layer_runs: int
    one_by_one: int
    layer_tokens: int
    decoded_layer_tokens: int
    head_tokens: int


def count_work(
    metric: Metric,
    layers: int,
    candidates: Sequence[int],
    text_tokens: int,
    requests: Sequence[Request],
    teacher_layers: int = 0,
) -> Work:
    """Counts what a metric needs.

    Args:
        layers: of the student.
        candidates: positions that are skipped, ascending.
        text_tokens: of the scoring text.
        requests: of all tasks.
        teacher_layers: of a teacher that runs on the text besides the student; 0 if the student is its own.
    """
    branches = 1 + (len(candidates) if metric.skips else 0)
    runs = layers + (sum(layers - 1 - position for position in candidates) if metric.skips else 0)
    runs += metric.runs_besides * len(candidates)
    text_tokens = text_tokens if "text" in metric.needs else 0
    requests = requests if "tasks" in metric.needs else []
    generations = [r for r in requests if isinstance(r, Generation)]
    likelihoods = [r for r in requests if isinstance(r, LogLikelihood)]
    continuations = sum(len(r.continuation) for r in likelihoods)
    contexts = {r.context for r in likelihoods}  # each runs once, however many continuations it has
    read = text_tokens + sum(map(len, contexts)) + continuations
    prompts, decoded = sum(len(r.prompt) for r in generations), sum(r.max_new_tokens for r in generations)
    scored = (2 * text_tokens if metric.skips else 0) + continuations
    return Work(
        tokens=read + prompts + decoded,
        layer_runs=runs,
        one_by_one=layers + len(candidates) * (layers - 1) if metric.skips else layers,
        layer_tokens=read * runs
        + (prompts + decoded) * layers * branches
        + (text_tokens * teacher_layers if metric.skips else 0),
        decoded_layer_tokens=decoded * layers * branches,
        head_tokens=(scored + decoded) * branches,
    )


def work_of(metric: Metric, inputs: ScoringInputs, candidates: Sequence[int]) -> Work:
    """Counts what a metric needs for these inputs, with some of their candidates."""
    samples = inputs.samples.values() if "tasks" in metric.needs else ()
    return count_work(
        metric,
        len(inputs.student.layers),
        candidates,
        int(inputs.text.mask.sum()) if inputs.text else 0,
        [request for task in samples for sample in task for request in sample.requests],
        0 if inputs.teacher is inputs.student else len(inputs.teacher.layers),
    )
