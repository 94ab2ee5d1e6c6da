"""What a study found, from the journals of its runs alone, as plain rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

from scipy.special import stdtrit

from layerpeel.report import gather
from layerpeel.run.folder import Run
from layerpeel.study.file import Job

Row = dict[str, Any]


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


def depth_rows(groups: dict[str, list[Run]]) -> list[Row]:
    """For each variant and depth, the mean over seeds of quality; runs that ended earlier are not in it."""
    rows = []
    for variant, runs in groups.items():
        found = [(row["round"], row["last_pass"], row) for run in runs for row in gather.depth_rows(run)]
        for key in sorted({(round_, last) for round_, last, _ in found}):
            own = [row for round_, last, row in found if (round_, last) == key]
            rows.append({"variant": variant, "removed": key[0], "last_pass": key[1], "runs": len(own), **_quality(own)})
    return rows


def result_rows(jobs: Sequence[Job], groups: dict[str, list[Run]]) -> list[Row]:
    """For each variant, what its runs ended with and what they took, means over seeds."""
    fields = list(dict.fromkeys(field for job in jobs for field in job.values))
    values = {job.variant: {field: _plain(job.values.get(field)) for field in fields} for job in jobs}
    rows = []
    for variant, runs in groups.items():
        ends = [_end(run) for run in runs]
        orders = [[event["removed"] for event in run.rounds[: gather.result_round(run)]] for run in runs]
        rows.append(
            {
                "variant": variant,
                **values[variant],
                "runs": len(runs),
                "removed": fmean(len(order) for order in orders),
                **_quality(ends),
                "removed_layers": " / ".join(dict.fromkeys(" ".join(map(str, order)) for order in orders)),
                **{key: fmean(_costs(run)[key] for run in runs) for key in _costs(runs[0])},
            }
        )
    return rows


def _end(run: Run) -> Row:
    rows = gather.depth_rows(run)
    return rows[gather.result_row(rows, run)]


def _quality(rows: Sequence[Row]) -> Row:
    """Means and intervals of what depth rows say."""
    found: Row = {key: fmean(row[key] for row in rows) for key in ("layers", "parameters")}
    for key in ("aggregate", "kept_quality"):
        values = [row[key] for row in rows]
        found |= {key: fmean(values), f"{key}_ci": interval(values)}
    return found


def _costs(run: Run) -> dict[str, float]:
    seconds, last = gather.seconds_of(run), gather.last_pass(run)
    scorings = [scores for event in run.rounds for scores in (event["scores"], event["scores"].get("cheap") or {})]
    trained = [event["training"] for event in [*run.rounds, *([last] if last else [])]]
    return {
        "scoring_seconds": seconds["scoring"],
        "layer_tokens": sum(scores.get("layer_tokens", 0) for scores in scorings),
        "training_seconds": seconds["training"],
        "training_tokens": sum(training["tokens"] for training in trained),
    }


def seconds_in_all(runs: Sequence[Run]) -> float:
    """What scoring and training took; a first scoring that runs share was done once."""
    total = sum(sum(gather.seconds_of(run).values()) for run in runs)
    known: list[Row] = []
    for run in runs:
        for event in run.rounds[:1]:
            total -= gather.cost_rows(run)[0]["scoring_seconds"] if event["scores"] in known else 0.0
            known.append(event["scores"])
    return total


def layer_rows(groups: dict[str, list[Run]]) -> list[Row]:
    """What the first scoring of each variant says of each layer, as a share of the teacher's aggregate."""
    rows = []
    for variant, runs in groups.items():
        first, teacher = [run.rounds[0]["scores"] for run in runs if run.rounds], runs[0].teacher
        assert first and teacher
        for layer in sorted(map(int, set.intersection(*(set(scores["importance"]) for scores in first)))):
            lost = [scores["importance"][str(layer)] / teacher["aggregate"] for scores in first]
            went = [event["round"] for run in runs for event in run.rounds if event["removed"] == layer]
            rows.append(
                {
                    "variant": variant,
                    "layer": layer,
                    "relative_depth": layer / (teacher["layers"] - 1),
                    "metric": first[0]["metric"],
                    "lost": fmean(lost),
                    "lost_ci": interval(lost),
                    "removed_in": len(went) / len(runs),
                    "round": fmean(went) if went else None,
                }
            )
    return rows


def pooled(values: Iterable[float | None]) -> float | None:
    """The mean of those that there are."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, type(None))) else str(value)
