"""The rows of a report's tables; a field is a column of the files, unless its class says otherwise."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from layerpeel.report.measurements import DepthSpeed
from layerpeel.tasks.scores import Evaluation


@dataclass(frozen=True)
class TableRow:
    """A row of a table that is written to files."""

    def columns(self) -> dict[str, Any]:
        """The value of each column of the CSV and JSON files."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class DepthRow(TableRow):
    """A depth to choose: the teacher, the student of a round, or the result after the last pass of training.

    Attributes:
        round: 0 for the teacher; as many layers have been removed.
        removed: teacher index of the layer that the round removed; None for the teacher.
        last_pass: whether this is the result after the training that followed the last removal.
        layers: number of layers.
        parameters: number of parameters; tied ones count once.
        parameters_kept: the share of the teacher's.
        bytes: size of the checkpoint's weights on disk; None if it cannot be estimated.
        aggregate: of the task scores, with its standard error.
        kept_quality: the aggregate as a share of the teacher's.
        evaluation: the task scores; in files, three columns for each task (value, standard error, n).
        speed: what was measured; in files, a column for each of its fields, and none where it was not measured.
    """

    round: int
    removed: int | None
    last_pass: bool
    layers: int
    parameters: int
    parameters_kept: float
    bytes: int | None
    aggregate: float
    aggregate_stderr: float
    kept_quality: float
    evaluation: Evaluation
    speed: DepthSpeed | None = None

    def columns(self) -> dict[str, Any]:
        columns = super().columns()
        del columns["evaluation"], columns["speed"]
        if self.speed:
            columns |= vars(self.speed)
        for task, score in self.evaluation.scores.items():
            columns |= {task: score.value, f"{task} stderr": score.stderr, f"{task} n": score.n}
        return columns


@dataclass(frozen=True)
class QualityRow(TableRow):
    """A depth of one of the compared runs.

    Attributes:
        run: the run's name.
        removed: number of layers removed.
        last_pass, layers, parameters, aggregate, aggregate_stderr, kept_quality: as in `DepthRow`.
    """

    run: str
    removed: int
    last_pass: bool
    layers: int
    parameters: int
    aggregate: float
    aggregate_stderr: float
    kept_quality: float


@dataclass(frozen=True)
class ImportanceRow(TableRow):
    """The importance of a layer in a round, by one metric.

    Attributes:
        round: counted from 1.
        layer: teacher index.
        metric: the metric's name.
        role: `decides`, or `shortlist` for the metric that chose the candidates of the deciding one.
        importance: quality lost when the layer is skipped.
        stderr: standard error of the importance, over samples or rows of text, where there are several.
        after_healing: aggregate lost after a short training without the layer, where that was tried.
        removed: whether the round removed the layer.
    """

    round: int
    layer: int
    metric: str
    role: str
    importance: float
    stderr: float | None
    after_healing: float | None
    removed: bool


@dataclass(frozen=True)
class RemovalRow(TableRow):
    """The layer that a round removed, and why.

    Attributes:
        round: counted from 1.
        removed: teacher index.
        metric: the deciding metric.
        importance: the layer's, by that metric.
        stderr: of that importance, over samples or rows of text, where there are several.
        candidates: number of layers that could be removed.
        scored: number of those that the deciding metric scored.
        cheap_chooses_same: whether the shortlist's metric ranks the same layer first; None without a shortlist.
    """

    round: int
    removed: int
    metric: str
    importance: float | None
    stderr: float | None
    candidates: int
    scored: int
    cheap_chooses_same: bool | None


@dataclass(frozen=True)
class CostRow(TableRow):
    """What a round cost, and how much quality it lost.

    Attributes:
        round: counted from 1.
        removed: teacher index of the layer.
        scoring_seconds: of the shortlist's and the deciding metric.
        healing_seconds: of the short trainings of candidates.
        repair_seconds: of the repair in closed form.
        error_before, error_after: of the projection whose error fell most, relative to the teacher's hidden states;
            None without repair.
        training_seconds: of the distillation.
        training_tokens: tokens of the distillation.
        first_loss, last_loss: means over the first and last tenth of the steps; None without training.
        aggregate_lost: aggregate before the round less that after it.
    """

    round: int
    removed: int
    scoring_seconds: float
    healing_seconds: float
    repair_seconds: float
    error_before: float | None
    error_after: float | None
    training_seconds: float
    training_tokens: int
    first_loss: float | None
    last_loss: float | None
    aggregate_lost: float
