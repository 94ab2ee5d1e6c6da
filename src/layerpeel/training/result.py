"""What a training did, and a repair."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

NO_LOSS = ("learning_rate", "gradient_norm", "tokens", "skipped")  # of what a point of the curve holds

Log = Callable[[dict[str, float]], None]


@dataclass(frozen=True)
class RepairedProjection:
    """What repair did to one projection.

    Attributes:
        layer: the teacher's index.
        name: of the projection in the layer.
        before, after: its error on the calibration text: squared distance to the teacher's hidden states, relative to
            their square, mean over tokens.
        ridge: in units of the mean diagonal of the Gram matrix; None where the projection stays as it was.
    """

    layer: int
    name: str
    before: float
    after: float
    ridge: float | None


@dataclass
class RepairResult:
    """What a repair in closed form did.

    Attributes:
        projections: from the first layer up.
        tokens: real ones of the calibration text, by all processes.
        seconds: wall-clock time.
        unknown: layers that were left as they are, since their projections cannot be told.
    """

    projections: list[RepairedProjection] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    unknown: list[int] = field(default_factory=list)

    @property
    def layers(self) -> list[int]:
        """The layers that were changed."""
        return sorted({each.layer for each in self.projections if each.ridge is not None})

    @property
    def most(self) -> RepairedProjection | None:
        """The projection whose error fell most; None where nothing was changed."""
        changed = [each for each in self.projections if each.ridge is not None]
        return max(changed, key=lambda each: each.before - each.after, default=None)


@dataclass
class TrainingCounts:
    """How much one round of training did.

    Attributes:
        layers: teacher indices of the trained layers.
        parameters: how many numbers trained.
        steps: optimizer steps.
        tokens: real tokens seen, by all processes; those seen again count again.
        skipped: steps that were skipped, since their loss or gradient was not finite.
        restarts: how often the round began again with half the learning rate, after too many of them.
        halved: how often a micro-batch was halved, since memory had run out.
        cached: the share of the rows whose teacher states were found on disk.
        seconds: wall-clock time.
        without_gradient: losses that do not depend on the student's weights.
    """

    layers: list[int]
    parameters: int = 0
    steps: int = 0
    tokens: int = 0
    skipped: int = 0
    restarts: int = 0
    halved: int = 0
    cached: float = 0.0
    seconds: float = 0.0
    without_gradient: list[str] = field(default_factory=list)


@dataclass
class TrainingResult(TrainingCounts):
    """What one round of training did.

    Attributes:
        curve: a dict a step: `loss`, each part without its weight, `learning_rate`, `gradient_norm`, `tokens` so far.
        repair: what was done before, in closed form, where the same call did both (`distill`).
    """

    curve: list[dict[str, float]] = field(default_factory=list)
    repair: RepairResult | None = None

    def summary(self) -> TrainingSummary:
        """The counts; of the curve, where there were steps, means over the first and the last tenth of them."""
        fields = {name: value for name, value in asdict(self).items() if name not in ("curve", "repair")}
        points = [point for point in self.curve if not point["skipped"]]
        if not points:
            return TrainingSummary(**fields)
        tenth = max(1, len(points) // 10)
        tenths = {
            name: [[point[name] for point in part] for part in (points[:tenth], points[-tenth:])]
            for name in points[0]
            if name not in NO_LOSS
        }
        ends = {name: (_mean(begin), _mean(end)) for name, (begin, end) in tenths.items()}
        first, last = ends.pop("loss")
        variances = [statistics.variance(part) / tenth for part in tenths["loss"]] if tenth > 1 else []
        return TrainingSummary(
            **fields,
            first_loss=first,
            last_loss=last,
            fall_error=math.sqrt(sum(variances)) if variances else None,
            losses=ends,
            gradient_norm=_mean([point["gradient_norm"] for point in points]),
        )


@dataclass
class TrainingSummary(TrainingCounts):
    """What one round of training did, without its curve.

    Attributes:
        first_loss, last_loss: means over the first and the last tenth of the steps; None where there were none.
        fall_error: the standard error of their difference; None where it cannot be told.
        losses: the two for each part of the loss, without its weight.
        gradient_norm: mean over all steps; None where there were none.
    """

    first_loss: float | None = None
    last_loss: float | None = None
    fall_error: float | None = None
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    gradient_norm: float | None = None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
