"""The paper's importance: how much the aggregate of the tasks drops when a layer is taken out (arXiv 2511.05085)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import NormalDist

from layerpeel.config.score import RaceConfig
from layerpeel.importance.base import Metric, MetricResult, ScoringInputs
from layerpeel.inference.engine import Engine
from layerpeel.inference.requests import Answer, len_of
from layerpeel.tasks.evaluation import answer_samples
from layerpeel.tasks.scores import Evaluation

LEAST_SAMPLES = 16
GROWTH = 1.5  # of the tokens, from one comparison in a race to the next


Answered = dict[str, dict[int, list[Answer]]]  # by task and sample
Counts = dict[str, int]  # of samples, by task


class TaskQuality(Metric):
    """The student's aggregate, less its aggregate with the layer skipped.

    In a race, all candidates start on a share of each task's samples. Those whose aggregate is below the best one's
    by more than chance explains (paired differences on the same samples, drawn without replacement) drop out; the
    others go on to half as many tokens again, from the tasks where they tell the most, until one is left or all samples
    are used. A task's first share is at least `LEAST_SAMPLES`: fewer say too little of how far they scatter.
    """

    needs = frozenset({"tasks"})

    def score(self, inputs: ScoringInputs) -> MetricResult:
        samples = inputs.samples
        orders = {name: _order(len(own), name) for name, own in samples.items()}
        whole = {name: len(own) for name, own in samples.items()}
        alive = list(inputs.candidates)
        answered: dict[int | None, Answered] = {stream: {name: {} for name in samples} for stream in (None, *alive)}
        findings = MetricResult({})
        taken, wanted = dict.fromkeys(samples, 0), _first(inputs.config.race, whole)
        while True:
            engine = Engine(
                inputs.student, inputs.tokenizer, alive, budget=inputs.budget, answer_cache=inputs.answer_cache
            )
            for task in inputs.tasks:
                own = samples[task.name]
                if new := sorted(orders[task.name][taken[task.name] : wanted[task.name]]):
                    said = answer_samples(engine, [own[sample] for sample in new], task.name)
                    for stream, answers in zip((None, *alive), said, strict=True):
                        answered[stream][task.name] |= zip(new, answers, strict=True)
            taken = wanted
            evaluations = {stream: _evaluate(inputs, answered[stream]) for stream in (None, *alive)}
            _record(findings, inputs, evaluations)
            if taken == whole:
                return findings
            alive = _survivors(
                findings, inputs, evaluations, alive, {name: taken[name] / whole[name] for name in whole}
            )
            share = sum(taken.values()) / sum(whole.values())
            findings.dropped |= {c: share for c in evaluations if c is not None and c not in alive}
            if len(alive) == 1:
                return findings
            wanted = _next(inputs, [evaluations[position] for position in alive], taken)


def _record(findings: MetricResult, inputs: ScoringInputs, evaluations: dict[int | None, Evaluation]) -> None:
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
    findings: MetricResult,
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
    scores = {}
    for task in inputs.tasks:
        answers = dict(sorted(answered[task.name].items()))
        samples = inputs.samples[task.name]
        scores[task.name] = task.score([samples[index] for index in answers], list(answers.values()))
    return Evaluation(scores)


def _first(race: RaceConfig | None, whole: Counts) -> Counts:
    """How many samples of each task all candidates start on: all of them without a race."""
    if not race:
        return whole
    return {name: min(n, max(math.ceil(race.first_share * n), LEAST_SAMPLES)) for name, n in whole.items()}


def _next(inputs: ScoringInputs, alive: Sequence[Evaluation], taken: Counts) -> Counts:
    """As many samples of each task as make `GROWTH` times the tokens so far.

    Each few more go to the task where they lower the variance of the paired differences the most for their tokens
    (Neyman's allocation). That of one sample is estimated as if another had differed, as few may agree by chance.
    """
    reference = inputs.reference or alive[0]
    pairs = [alive[0].difference_variances(other, reference, inputs.aggregate) for other in alive[1:]]
    spread = {name: max(pair[name] * n for pair in pairs) + 1 / n for name, n in taken.items()}
    whole = {name: len(own) for name, own in inputs.samples.items()}
    cost = {
        name: sum(len_of(request) for sample in own for request in sample.requests) / len(own)
        for name, own in inputs.samples.items()
    }

    def tokens(counts: Counts) -> float:
        return sum(cost[name] * n for name, n in counts.items())

    def gain(name: str) -> float:
        return spread[name] / wanted[name] ** 2 / cost[name]

    wanted = dict(taken)
    while tokens(wanted) < GROWTH * tokens(taken) and (left := [name for name in wanted if wanted[name] < whole[name]]):
        name = max(left, key=gain)
        wanted[name] = min(whole[name], wanted[name] + max(1, taken[name] // 16))
    return wanted


def _order(samples: int, name: str) -> list[int]:
    """The samples in random order, the same each time: a file may begin with the easy ones."""
    return random.Random(name).sample(range(samples), samples)
