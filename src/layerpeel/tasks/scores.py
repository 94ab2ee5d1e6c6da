"""Scores of tasks, their errors, and the aggregate of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

MOST_TIMES = 1000  # as good as the reference, for an error that may be 0


@dataclass(frozen=True)
class TaskScore:
    """A task's score: its value as people read it, its standard error, and the number of samples.

    Attributes:
        influences: [n], how far each sample moves the value from the mean (to first order); the paired standard error
            of a difference of two scores is that of the differences of these. None if the score is no mean over
            samples.
        chance: what guessing would score, if known.
        cut: samples whose prompt was longer than the model's context, and was cut at its beginning.
    """

    value: float
    stderr: float
    n: int
    lower_is_better: bool = False
    influences: tuple[float, ...] | None = field(default=None, repr=False, compare=False)
    chance: float | None = None
    cut: int = 0

    @classmethod
    def of_mean(
        cls, samples: Sequence[float], weights: Sequence[float] | None = None, *, chance: float | None = None
    ) -> TaskScore:
        """The (weighted) mean, with the standard error of the sample (n - 1); of a ratio, by the delta method."""
        n = len(samples)
        weights = weights or [1.0] * n
        total = math.fsum(weights) or 1.0  # documents without a token weigh nothing
        mean = math.fsum(w * sample for w, sample in zip(weights, samples, strict=True)) / total
        influences = tuple(n * w * (sample - mean) / total for w, sample in zip(weights, samples, strict=True))
        return cls(mean, _stderr_of(influences), n, influences=influences, chance=chance)


def _stderr_of(influences: Sequence[float]) -> float:
    n = len(influences)
    return math.sqrt(math.fsum(value**2 for value in influences) / max(n - 1, 1) / n)


def _times_as_good(value: float, reference: float) -> float:
    """How good a score is of which lower ones are better: 1 where it is the reference's, if that is 0, too."""
    return 1.0 if value == reference else reference / _floored(value, reference)


def _floored(value: float, reference: float) -> float:
    """A score of which lower ones are better, as if it were no better than `MOST_TIMES` the reference."""
    return max(value, reference / MOST_TIMES)


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model on all tasks."""

    scores: dict[str, TaskScore]

    def qualities(self, reference: Evaluation) -> dict[str, float]:
        """Each task's score as higher-is-better: of perplexity, the reference's divided by this model's."""
        return {
            name: _times_as_good(score.value, reference.scores[name].value) if score.lower_is_better else score.value
            for name, score in self.scores.items()
        }

    def aggregate(self, reference: Evaluation, how: str = "mean") -> float:
        """One number: the mean of the qualities (the paper's), or of quality / the reference's (`relative`)."""
        qualities, reference_qualities = self.qualities(reference), reference.qualities(reference)
        if how == "relative":
            qualities = {
                name: value / reference_qualities[name] if reference_qualities[name] else 1.0
                for name, value in qualities.items()
            }
        return sum(qualities.values()) / len(qualities)

    def aggregate_stderr(self, reference: Evaluation, how: str = "mean") -> float:
        """The standard error of the aggregate, from those of its tasks; the teacher's scores are taken as exact."""
        exact = Evaluation({name: replace(score, stderr=0.0) for name, score in reference.scores.items()})
        return self.difference_stderr(exact, reference, how)

    def difference_stderr(
        self, other: Evaluation, reference: Evaluation, how: str = "mean", seen: Mapping[str, float] | None = None
    ) -> float:
        """The standard error of the difference between two models' aggregates, paired sample by sample.

        Args:
            reference: the teacher's evaluation, taken as exact.
            seen: the share of each task's samples that the scores are of, if not of all. Samples are drawn without
                replacement, so the error of the final difference goes to 0 as the share goes to 1.
        """
        variances = self.difference_variances(other, reference, how)
        remaining = [variance * (1 - seen[name] if seen else 1) for name, variance in variances.items()]
        return math.sqrt(math.fsum(remaining)) / len(remaining)

    def difference_variances(self, other: Evaluation, reference: Evaluation, how: str = "mean") -> dict[str, float]:
        """By task, the variance of the difference between two models' qualities, paired where samples can be."""
        variances = {}
        for name in self.scores:
            left, right = (e._quality_influences(name, reference, how) for e in (self, other))
            if left is not None and right is not None:
                variances[name] = _stderr_of([a - b for a, b in zip(left, right, strict=True)]) ** 2
            else:
                variances[name] = sum(
                    (e.scores[name].stderr * e._quality_slope(name, reference, how)) ** 2 for e in (self, other)
                )
        return variances

    def _quality_influences(self, name: str, reference: Evaluation, how: str) -> list[float] | None:
        influences = self.scores[name].influences
        slope = self._quality_slope(name, reference, how)
        return None if influences is None else [slope * value for value in influences]

    def _quality_slope(self, name: str, reference: Evaluation, how: str) -> float:
        """Derivative of the task's part of the aggregate by the task's value."""
        score, reference_value = self.scores[name], reference.scores[name].value
        slope = 1.0
        if score.lower_is_better:
            value = _floored(score.value, reference_value)
            slope = -reference_value / value / value if value else 0.0  # in this order, as a square may overflow
        reference_quality = 1.0 if score.lower_is_better else reference_value
        return slope / reference_quality if how == "relative" and reference_quality else slope
