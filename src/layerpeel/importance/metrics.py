"""The table of metrics, by the names that a config uses."""

from __future__ import annotations

from layerpeel.config.score import ScoreConfig
from layerpeel.errors import InputError, reason_of, resolve_class
from layerpeel.importance.base import Metric
from layerpeel.importance.block_influence import BlockInfluence
from layerpeel.importance.repaired_kl import RepairedKL
from layerpeel.importance.task_quality import TaskQuality
from layerpeel.importance.teacher_kl import TeacherKL

METRICS: dict[str, type[Metric]] = {
    "task_quality": TaskQuality,
    "teacher_kl": TeacherKL,
    "repaired_kl": RepairedKL,
    "block_influence": BlockInfluence,
}


def make_metric(name: str) -> Metric:
    """Creates a metric from its name in `METRICS`, or from a user's `module:Class`.

    Raises:
        InputError: the name is unknown, or the class cannot be imported or created.
    """
    metric_class = resolve_class(name, METRICS, "metric", Metric)
    try:
        metric: Metric = metric_class()
        metric.name = name
    except Exception as error:  # whatever a user's class raises
        raise InputError(
            f"metric '{name}' cannot be made ({reason_of(error)})", hint="it is called without arguments"
        ) from None
    return metric


def check_metrics(config: ScoreConfig, *, has_text: bool, has_tasks: bool) -> None:
    """Checks that every metric that a config names exists and is given what it reads.

    Raises:
        InputError: a metric is unknown, or has no text or no tasks to read.
    """
    for field_name, name in _named(config).items():
        needs = make_metric(name).needs
        if "text" in needs and not has_text:
            raise InputError(f"{field_name}: {name} reads text, and none is given", hint="set score.text")
        if "tasks" in needs and not has_tasks:
            raise InputError(f"{field_name}: {name} needs tasks, and none are given", hint="list some under tasks")


def reads_text(config: ScoreConfig) -> bool:
    """Whether any metric that a config names reads text."""
    return any("text" in make_metric(name).needs for name in _named(config).values())


def _named(config: ScoreConfig) -> dict[str, str]:
    """The names of a config's metrics, by field."""
    shortlist = {"score.shortlist.by": config.shortlist.by} if config.shortlist else {}
    return {"score.decide": config.decide} | shortlist
