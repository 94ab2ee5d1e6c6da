"""The paper's importance: how much the aggregate of the tasks drops when a layer is taken out (arXiv 2511.05085)."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from statistics import NormalDist

from layerpeel.config import RaceConfig
from layerpeel.importance.base import Findings, Metric, ScoringInputs
from layerpeel.tasks.answering import Engine, answer_samples
from layerpeel.tasks.base import Answer, Evaluation

LEAST_SAMPLES = 16

Answered = dict[str, dict[int, list[Answer]]]  # by task and sample


class TaskQuality(Metric):
    """The student's aggregate, less its aggregate with the layer skipped.

    In a race, all candidates start on a share of each task's samples. Those whose aggregate is below the best one's
    by more than chance explains (paired differences on the same samples, drawn without replacement) drop out; the
    others go on to twice the share, until one is left or all samples are used. A task's first share is at least
    `LEAST_SAMPLES`: fewer say too little of how far they scatter.
    """

    needs = frozenset({"tasks"})

    def score(self, inputs: ScoringInputs) -> Findings:
        samples = inputs.samples
        orders = {name: _order(len(own), name) for name, own in samples.items()}
        alive = list(inputs.candidates)
        answered: dict[int | None, Answered] = {stream: {name: {} for name in samples} for stream in (None, *alive)}
        findings = Findings({})
        before = 0.0
        for share in _shares(inputs.config.race):
            engine = Engine(inputs.student, inputs.tokenizer, alive, budget=inputs.budget, store=inputs.store)
            for task in inputs.tasks:
                order, own = orders[task.name], samples[task.name]
                new = order[_taken(before, len(order)) : _taken(share, len(order))]
                said = answer_samples(engine, {sample: own[sample] for sample in sorted(new)}, task.name)
                for stream, answers in zip((None, *alive), said, strict=True):
                    answered[stream][task.name] |= answers
            evaluations = {stream: _evaluate(inputs, answered[stream]) for stream in (None, *alive)}
            seen = {name: _taken(share, len(order)) / len(order) for name, order in orders.items()}
            _record(findings, inputs, evaluations)
            if share < 1:
                alive = _survivors(findings, inputs, evaluations, alive, seen)
                findings.dropped |= {c: share for c in evaluations if c is not None and c not in alive}
                if len(alive) == 1:
                    break
            before = share
        return findings


def _record(findings: Findings, inputs: ScoringInputs, evaluations: dict[int | None, Evaluation]) -> None:
    """The importance of each candidate that was evaluated, with its paired error."""
    whole = evaluations[None]
    reference = inputs.reference or whole
    quality = whole.aggregate(reference, inputs.aggregate)
    for position, evaluation in evaluations.items():
        if position is not None:
            findings.importance[position] = quality - evaluation.aggregate(reference, inputs.aggregate)
            findings.stderr[position] = whole.difference_stderr(evaluation, reference, inputs.aggregate)
            findings.evaluations[position] = evaluation


def _survivors(
    findings: Findings,
    inputs: ScoringInputs,
    evaluations: dict[int | None, Evaluation],
    alive: list[int],
    seen: dict[str, float],
) -> list[int]:
    assert inputs.config.race
    limit = NormalDist().inv_cdf(inputs.config.race.confidence)
    best = min(alive, key=lambda position: (findings.importance[position], position))
    reference = inputs.reference or evaluations[None]

    def worse(position: int) -> bool:
        gap = findings.importance[position] - findings.importance[best]
        error = evaluations[best].difference_stderr(evaluations[position], reference, inputs.aggregate, seen)
        return gap > limit * error

    return [position for position in alive if position == best or not worse(position)]


def _evaluate(inputs: ScoringInputs, answered: Answered) -> Evaluation:
    return Evaluation({task.name: task.score(dict(sorted(answered[task.name].items()))) for task in inputs.tasks})


def _shares(race: RaceConfig | None) -> Iterator[float]:
    """Shares of the samples, each twice the one before; all at once without a race."""
    share = race.first_share if race else 1.0
    while share < 1:
        yield share
        share *= 2
    yield 1.0


def _taken(share: float, samples: int) -> int:
    """How many of a task's samples a share is."""
    return min(samples, max(math.ceil(share * samples), LEAST_SAMPLES)) if share else 0


def _order(samples: int, name: str) -> list[int]:
    """The samples in random order, the same each time: a file may begin with the easy ones."""
    return random.Random(name).sample(range(samples), samples)
