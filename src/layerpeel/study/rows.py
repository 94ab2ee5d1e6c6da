"""The rows of a study's tables; a field is a column of the files, unless its class says otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from layerpeel.report.rows import TableRow


@dataclass(frozen=True)
class ResultRow(TableRow):
    """What the runs of a variant ended with, means over seeds.

    Attributes:
        variant: its name.
        values: the fields of the config that differ between variants; in files, a column for each.
        runs: number of runs, one a seed.
        removed: number of layers removed.
        layers, parameters: of the results.
        aggregate, kept_quality: of the results, each with the half width of its 95 % confidence interval (`..._ci`),
            None for a single run.
        removed_layers: the removed layers in order; several orders are separated by slashes.
        scoring_seconds, layer_tokens, training_seconds, training_tokens: as in `report.gather.Costs`, with repair in
            the training's seconds.
    """

    variant: str
    values: Mapping[str, Any]
    runs: int
    removed: float
    layers: float
    parameters: float
    aggregate: float
    aggregate_ci: float | None
    kept_quality: float
    kept_quality_ci: float | None
    removed_layers: str
    scoring_seconds: float
    layer_tokens: float
    training_seconds: float
    training_tokens: float

    def columns(self) -> dict[str, Any]:
        columns = super().columns()
        values = columns.pop("values")
        return {"variant": columns.pop("variant")} | values | columns


@dataclass(frozen=True)
class VariantDepthRow(TableRow):
    """A variant at one depth, means over the seeds whose runs came so far.

    Attributes:
        variant: its name.
        removed: number of layers removed.
        last_pass: whether this is after the training that followed the last removal.
        runs: number of runs, one a seed.
        layers, parameters, aggregate, aggregate_ci, kept_quality, kept_quality_ci: as in `ResultRow`.
    """

    variant: str
    removed: int
    last_pass: bool
    runs: int
    layers: float
    parameters: float
    aggregate: float
    aggregate_ci: float | None
    kept_quality: float
    kept_quality_ci: float | None


@dataclass(frozen=True)
class LayerRow(TableRow):
    """A layer in the first scoring of a variant's runs, means over seeds.

    Attributes:
        variant: its name.
        layer: teacher index.
        relative_depth: 0 for the first layer, 1 for the last.
        metric: the deciding metric.
        lost: the layer's importance as a share of the teacher's aggregate.
        lost_ci: half width of its 95 % confidence interval; None for a single run.
        removed_in: the share of the runs that removed the layer.
        round: in which round they did; None if none did.
    """

    variant: str
    layer: int
    relative_depth: float
    metric: str
    lost: float
    lost_ci: float | None
    removed_in: float
    round: float | None


@dataclass(frozen=True)
class RankingRow(TableRow):
    """How the ranking of layers by some tasks compares with that by all tasks.

    Attributes:
        ranking: the task, or the size of the random subsets.
        subsets: number of sets of tasks.
        tau: Kendall's tau with the ranking by all tasks, mean over the sets; None where a ranking is all ties.
        first_picks: the layers ranked first, where there is one set.
        same_first: the share of the sets that rank the same layer first.
        shared_firsts: the share of the first layers that are the same, mean over the sets.
    """

    ranking: str
    subsets: int
    tau: float | None
    first_picks: str
    same_first: float
    shared_firsts: float


@dataclass(frozen=True)
class TauRow(TableRow):
    """Kendall's tau of one ranking with each other.

    Attributes:
        ranking: its name.
        taus: by the name of the other ranking, each a column of the files; None where a ranking is all ties.
    """

    ranking: str
    taus: Mapping[str, float | None]

    def columns(self) -> dict[str, Any]:
        return {"ranking": self.ranking, **self.taus}


@dataclass
class StudyRows:
    """The rows of a study's tables; a table without rows is not written.

    Attributes:
        results: a row a variant.
        depths: a row a variant and depth.
        rankings, tau: where the study compares rankings.
        layers: where the study shows the importance of layers.
    """

    results: list[ResultRow]
    depths: list[VariantDepthRow]
    rankings: list[RankingRow] = field(default_factory=list)
    tau: list[TauRow] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)

    def tables(self) -> dict[str, list[TableRow]]:
        """By name, those that have rows."""
        return {each.name: rows for each in fields(self) if (rows := getattr(self, each.name))}
