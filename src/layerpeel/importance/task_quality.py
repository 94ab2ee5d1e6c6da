"""The paper's importance: how much the aggregate of the tasks drops when a layer is taken out (arXiv 2511.05085)."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import NormalDist

from layerpeel.config.score import RaceConfig
from layerpeel.importance.base import GROWTH, Metric, MetricResult, ScoringInputs
from layerpeel.inference.engine import Engine
from layerpeel.inference.requests import Answer, len_of
from layerpeel.tasks.evaluation import answer_samples
from layerpeel.tasks.scores import Evaluation

LEAST_SAMPLES = 16


Answered = dict[str, dict[int, list[Answer]]]  # by task and sample
Counts = dict[str, int]  # of samples, by task


class TaskQuality(Metric):
    """The student's aggregate, less its aggregate with the layer skipped.

    In a race, all candidates start on a share of each task's samples. Those whose aggregate is below the best one's
    by more than chance explains (paired differences on the same samples, drawn without replacement) are dropped; the
    others go on to half as many tokens again, from the tasks where they differ the most, until one is left or all
    samples are used. A task's first share is at least `LEAST_SAMPLES`: from fewer, their variance cannot be estimated.
    """

    needs = frozenset({"tasks"})
    races = True

    def score(self, inputs: ScoringInputs) -> MetricResult:
        orders = {name: _order(len(samples), name) for name, samples in inputs.samples.items()}
        total = _sample_counts(inputs)
        alive = list(inputs.candidates)
        answered: dict[int | None, Answered] = {
            branch: {name: {} for name in inputs.samples} for branch in (None, *alive)
        }
        result = MetricResult({})
        taken, wanted = dict.fromkeys(total, 0), _first(inputs.config.race, total)
        while True:
            batch = {name: sorted(orders[name][taken[name] : wanted[name]]) for name in total}
            _answer(inputs, alive, batch, answered)
            taken = wanted
            evaluations = {branch: _evaluate(inputs, answered[branch]) for branch in (None, *alive)}
            _record(result, inputs, evaluations)
            if taken == total:
                return result
            alive = _survivors(result, inputs, evaluations, alive, {name: taken[name] / total[name] for name in total})
            share = sum(taken.values()) / sum(total.values())
            result.dropped |= {c: share for c in evaluations if c is not None and c not in alive}
            if len(alive) == 1:
                return result
            wanted = _next(inputs, [evaluations[position] for position in alive], taken)


def _answer(
    inputs: ScoringInputs,
    candidates: list[int],
    indices: dict[str, list[int]],
    answered: dict[int | None, Answered],
) -> None:
    """Adds the answers to the samples at `indices` of each task, of the untouched model and with each layer skipped."""
    engine = Engine(
        inputs.student, inputs.tokenizer, candidates, budget=inputs.budget, answer_cache=inputs.answer_cache
    )
    for name, samples in inputs.samples.items():
        if indices[name]:
            by_branch = answer_samples(engine, [samples[index] for index in indices[name]], name)
            for branch, answers in zip((None, *candidates), by_branch, strict=True):
                answered[branch][name] |= zip(indices[name], answers, strict=True)


def _record(result: MetricResult, inputs: ScoringInputs, evaluations: dict[int | None, Evaluation]) -> None:
    """Sets the importance of each candidate that was evaluated, with its paired error."""
    untouched = evaluations[None]
    reference = inputs.reference or untouched
    quality = untouched.aggregate(reference, inputs.aggregate)
    for position, evaluation in evaluations.items():
        if position is not None:
            result.importance[position] = quality - evaluation.aggregate(reference, inputs.aggregate)
            result.stderr[position] = untouched.difference_stderr(evaluation, reference, inputs.aggregate)
            result.evaluations[position] = evaluation


def _survivors(
    result: MetricResult,
    inputs: ScoringInputs,
    evaluations: dict[int | None, Evaluation],
    alive: list[int],
    seen: dict[str, float],
) -> list[int]:
    """The candidates that are not significantly worse than the best one.

    Args:
        seen: the share of each task's samples that were answered.
    """
    assert inputs.config.race
    limit = NormalDist().inv_cdf(inputs.config.race.confidence)
    best = min(alive, key=lambda position: (result.importance[position], position))
    reference = inputs.reference or evaluations[None]

    def worse(position: int) -> bool:
        gap = result.importance[position] - result.importance[best]
        error = evaluations[best].difference_stderr(evaluations[position], reference, inputs.aggregate, seen)
        return gap > limit * error

    return [position for position in alive if position == best or not worse(position)]


def _evaluate(inputs: ScoringInputs, answered: Answered) -> Evaluation:
    scores = {}
    for task in inputs.tasks:
        answers, samples = dict(sorted(answered[task.name].items())), inputs.samples[task.name]
        scores[task.name] = task.score([samples[index] for index in answers], list(answers.values()))
    return Evaluation(scores)


def _sample_counts(inputs: ScoringInputs) -> Counts:
    return {name: len(samples) for name, samples in inputs.samples.items()}


def _first(race: RaceConfig | None, total: Counts) -> Counts:
    """How many samples of each task all candidates start on: all of them without a race."""
    if not race:
        return total
    return {name: min(n, max(math.ceil(race.first_share * n), LEAST_SAMPLES)) for name, n in total.items()}


def _next(inputs: ScoringInputs, alive: Sequence[Evaluation], taken: Counts) -> Counts:
    """As many samples of each task as make `GROWTH` times the tokens so far.

    Each step adds samples of the task where they lower the variance of the paired differences the most for their
    tokens (Neyman's allocation). A sample's variance is estimated as if one more had differed: few may agree by chance.
    """
    reference = inputs.reference or alive[0]
    pairs = [alive[0].difference_variances(other, reference, inputs.aggregate) for other in alive[1:]]
    spread = {name: max(pair[name] * n for pair in pairs) + 1 / n for name, n in taken.items()}
    total = _sample_counts(inputs)
    cost = {
        name: sum(len_of(request) for sample in samples for request in sample.requests) / len(samples)
        for name, samples in inputs.samples.items()
    }

    def tokens(counts: Counts) -> float:
        return sum(cost[name] * n for name, n in counts.items())

    def gain(name: str) -> float:
        return spread[name] / wanted[name] ** 2 / cost[name]

    wanted = dict(taken)
    while tokens(wanted) < GROWTH * tokens(taken) and (
        unfinished := [name for name in wanted if wanted[name] < total[name]]
    ):
        name = max(unfinished, key=gain)
        wanted[name] = min(total[name], wanted[name] + max(1, taken[name] // 16))
    return wanted


def _order(samples: int, name: str) -> list[int]:
    """The samples in random order, the same each time: a file may begin with the easy ones."""
    return random.Random(name).sample(range(samples), samples)
