"""The rows of a study's tables, from the records of its runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

from scipy.special import stdtrit

from layerpeel.errors import InputError
from layerpeel.importance.scores import LayerScores
from layerpeel.report import gather
from layerpeel.report.rows import DepthRow
from layerpeel.run.folder import Run
from layerpeel.study.file import Job
from layerpeel.study.rows import LayerRow, ResultRow, VariantDepthRow


def interval(values: Sequence[float], level: float = 0.95) -> float | None:
    """Half the width of the confidence interval of a mean, by Student's t; None for a single value."""
    n = len(values)
    return float(stdtrit(n - 1, (1 + level) / 2)) * stdev(values) / math.sqrt(n) if n > 1 else None


def by_variant(jobs: Sequence[Job], runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each variant, one a seed."""
    groups: dict[str, list[Run]] = {}
    for job, run in zip(jobs, runs, strict=True):
        groups.setdefault(job.variant, []).append(run)
    return groups


def depth_rows(groups: dict[str, list[Run]]) -> list[VariantDepthRow]:
    """For each variant and depth, the mean quality over seeds; runs that ended earlier are left out."""
    rows = []
    for variant, runs in groups.items():
        by_depth: dict[tuple[int, bool], list[DepthRow]] = {}
        for row in (row for run in runs for row in gather.depth_rows(run)):
            by_depth.setdefault((row.round, row.last_pass), []).append(row)
        for (removed, last_pass), depths in sorted(by_depth.items()):
            rows.append(VariantDepthRow(variant, removed, last_pass, len(depths), **_quality(depths)))
    return rows


def result_rows(jobs: Sequence[Job], groups: dict[str, list[Run]]) -> list[ResultRow]:
    """For each variant, what its runs ended with and what they took, means over seeds."""
    names = list(dict.fromkeys(name for job in jobs for name in job.values))
    values = {job.variant: {name: _plain(job.values.get(name)) for name in names} for job in jobs}
    return [_result_row(variant, values[variant], runs) for variant, runs in groups.items()]


def _result_row(variant: str, values: dict[str, Any], runs: Sequence[Run]) -> ResultRow:
    orders = [[each.removed for each in run.rounds[: run.result_round]] for run in runs]
    costs = [gather.costs_of(run) for run in runs]
    return ResultRow(
        variant=variant,
        values=values,
        runs=len(runs),
        removed=fmean(len(order) for order in orders),
        **_quality([_result(run) for run in runs]),
        removed_layers=" / ".join(dict.fromkeys(" ".join(map(str, order)) for order in orders)),
        scoring_seconds=fmean(each.scoring_seconds for each in costs),
        layer_tokens=fmean(each.layer_tokens for each in costs),
        training_seconds=fmean(each.repair_seconds + each.training_seconds for each in costs),
        training_tokens=fmean(each.training_tokens for each in costs),
    )


def _result(run: Run) -> DepthRow:
    rows = gather.depth_rows(run)
    return rows[gather.result_row(rows, run)]


def _quality(rows: Sequence[DepthRow]) -> dict[str, Any]:
    """The fields that a result and a depth have in common: means of depth rows, with intervals."""
    aggregates, shares = [row.aggregate for row in rows], [row.kept_quality for row in rows]
    return {
        "layers": fmean(row.layers for row in rows),
        "parameters": fmean(row.parameters for row in rows),
        "aggregate": fmean(aggregates),
        "aggregate_ci": interval(aggregates),
        "kept_quality": fmean(shares),
        "kept_quality_ci": interval(shares),
    }


def seconds_in_all(runs: Sequence[Run]) -> float:
    """What scoring and training took; a first scoring that several runs share counts once."""
    total = sum(gather.costs_of(run).seconds for run in runs)
    counted: list[LayerScores] = []
    for run in runs:
        for first in run.rounds[:1]:
            total -= gather.cost_rows(run)[0].scoring_seconds if first.scores in counted else 0.0
            counted.append(first.scores)
    return total


def layer_rows(groups: dict[str, list[Run]]) -> list[LayerRow]:
    """What the first scoring of each variant says of each layer that all its seeds scored.

    Raises:
        InputError: a variant scored no layers, or its teacher scores 0.
    """
    return [row for variant, runs in groups.items() for row in _layer_rows(variant, runs)]


def _layer_rows(variant: str, runs: Sequence[Run]) -> Iterable[LayerRow]:
    scorings, teacher = [first_scoring(run) for run in runs], runs[0].teacher
    assert teacher
    if not teacher.aggregate:
        raise InputError(
            f"variant {variant}: its teacher scores 0, and a layer can lose no share of that",
            hint="name tasks that the teacher can do, or another `show`, which is drawn from the same runs",
        )
    for layer in sorted(set.intersection(*(set(scores.importance) for scores in scorings))):
        lost = [scores.importance[layer] / teacher.aggregate for scores in scorings]
        rounds = [each.number for run in runs for each in run.rounds if each.removed == layer]
        yield LayerRow(
            variant=variant,
            layer=layer,
            relative_depth=layer / (teacher.layers - 1),
            metric=scorings[0].metric,
            lost=fmean(lost),
            lost_ci=interval(lost),
            removed_in=len(rounds) / len(runs),
            round=fmean(rounds) if rounds else None,
        )


def first_scoring(run: Run) -> LayerScores:
    """What a run's first removal was decided by.

    Raises:
        InputError: it removed nothing.
    """
    if not run.rounds:
        raise InputError(
            f"{run.folder}: no layer was removed, so there are no scores to show",
            hint="set a `stop` that the teacher does not meet, and another output; `show: results` needs no scores",
        )
    return run.rounds[0].scores


def mean_or_none(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None if there are none."""
    numbers = [value for value in values if value is not None]
    return fmean(numbers) if numbers else None


def _plain(value: Any) -> Any:
    """The value, as text if it is no scalar."""
    return value if isinstance(value, (int, float, str, type(None))) else str(value)
