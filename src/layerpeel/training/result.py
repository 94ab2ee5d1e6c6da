"""What a training did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

NO_LOSS = ("learning_rate", "gradient_norm", "tokens", "skipped")  # of what a point of the curve holds

Log = Callable[[dict[str, float]], None]


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
    """

    curve: list[dict[str, float]] = field(default_factory=list)

    def summary(self) -> TrainingSummary:
        """All but the curve; of it, where there were steps, means over the first and the last tenth of them."""
        fields = {name: value for name, value in asdict(self).items() if name != "curve"}
        points = [point for point in self.curve if not point["skipped"]]
        if not points:
            return TrainingSummary(**fields)
        tenth = max(1, len(points) // 10)
        ends = {
            name: (_mean([point[name] for point in points[:tenth]]), _mean([point[name] for point in points[-tenth:]]))
            for name in points[0]
            if name not in NO_LOSS
        }
        first, last = ends.pop("loss")
        norm = _mean([point["gradient_norm"] for point in points])
        return TrainingSummary(**fields, first_loss=first, last_loss=last, losses=ends, gradient_norm=norm)


@dataclass
class TrainingSummary(TrainingCounts):
    """What one round of training did, without its curve.

    Attributes:
        first_loss, last_loss: means over the first and the last tenth of the steps; None where there were none.
        losses: the two for each part of the loss, without its weight.
        gradient_norm: mean over all steps; None where there were none.
    """

    first_loss: float | None = None
    last_loss: float | None = None
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)
    gradient_norm: float | None = None


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
