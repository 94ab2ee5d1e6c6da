"""What a metric asks of a model, counted before it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerpeel.importance.base import Metric, ScoringInputs
from layerpeel.inference.requests import Generation, LogLikelihood, Request


@dataclass(frozen=True)
class Work:
    """Tokens and layers; racing and early ends of generated text make it less.

    Attributes:
        tokens: of the text or the tasks, those to be generated included.
        layer_runs: how often a layer runs on each of those that are read and not continued, over all candidates.
        one_by_one: how often it would, if each candidate were removed and run.
        layer_tokens: tokens that go through a layer, over all layers and candidates; of these,
        decoded_layer_tokens: one at a time, as text is generated.
        head_tokens: tokens that go through the head.
    """

    tokens: int
    layer_runs: int
    one_by_one: int
    layer_tokens: int
    decoded_layer_tokens: int
    head_tokens: int


def count_work(
    metric: Metric, layers: int, candidates: Sequence[int], text_tokens: int, requests: Sequence[Request], own: int = 0
) -> Work:
    """Counts what a metric asks.

    Args:
        layers: of the student.
        candidates: positions that are skipped, ascending.
        text_tokens: of the scoring text.
        requests: of all tasks.
        own: layers of the teacher, where it runs besides.
    """
    streams = 1 + (len(candidates) if metric.skips else 0)
    runs = layers + (sum(layers - 1 - position for position in candidates) if metric.skips else 0)
    read = text_tokens if "text" in metric.needs else 0
    requests = requests if "tasks" in metric.needs else []
    written = [r for r in requests if isinstance(r, Generation)]
    asked = [r for r in requests if isinstance(r, LogLikelihood)]
    contexts = {r.context for r in asked}  # which run once, whatever follows them
    walked = read + sum(map(len, contexts)) + sum(len(r.continuation) for r in asked)
    prompts, decoded = sum(len(r.prompt) for r in written), sum(r.max_new_tokens for r in written)
    scored = (2 * read if metric.skips else 0) + sum(len(r.continuation) for r in asked)
    return Work(
        tokens=walked + prompts + decoded,
        layer_runs=runs,
        one_by_one=layers + len(candidates) * (layers - 1) if metric.skips else layers,
        layer_tokens=walked * runs + (prompts + decoded) * layers * streams + (read * own if metric.skips else 0),
        decoded_layer_tokens=decoded * layers * streams,
        head_tokens=(scored + decoded) * streams,
    )


def work_of(metric: Metric, inputs: ScoringInputs, candidates: Sequence[int]) -> Work:
    """Counts what a metric asks of a student with some candidates."""
    samples = inputs.samples.values() if "tasks" in metric.needs else ()
    return count_work(
        metric,
        len(inputs.student.layers),
        candidates,
        int(inputs.text.mask.sum()) if inputs.text else 0,
        [request for task in samples for sample in task for request in sample.requests],
        0 if inputs.teacher is inputs.student else len(inputs.teacher.layers),
    )
