"""Layer importance, one metric a file; what each reads of the model comes from one walk over its layers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.config import RunConfig, ScoreConfig
from layerpeel.data import load_rows
from layerpeel.errors import InputError, resolve_class
from layerpeel.importance.base import Metric, ScoringInputs
from layerpeel.importance.block_influence import BlockInfluence
from layerpeel.importance.task_quality import TaskQuality
from layerpeel.importance.teacher_kl import TeacherKL
from layerpeel.stack import Stack
from layerpeel.surgery import Depth
from layerpeel.tasks import Task
from layerpeel.tasks.base import Evaluation

METRICS: dict[str, type[Metric]] = {
    "task_quality": TaskQuality,
    "teacher_kl": TeacherKL,
    "block_influence": BlockInfluence,
}


@dataclass
class LayerScores:
    """The importance of each candidate, by teacher layer: quality lost when it is skipped; low goes first.

    Attributes:
        metric: the metric that decides.
        importance: of the candidates it scored.
        evaluations: task scores of each candidate, where the metric runs tasks.
        seconds: what it took.
        cheap: the scores that made the shortlist, if one was asked for.
    """

    metric: str
    importance: dict[int, float]
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    seconds: float = 0.0
    cheap: LayerScores | None = None

    def ranked(self) -> list[int]:
        """Teacher layers, least important first; ties go to the lower index."""
        return sorted(self.importance, key=lambda layer: (self.importance[layer], layer))

    def to_json(self) -> dict[str, Any]:
        """For the journal; with a shortlist, whether the cheap metric alone would have chosen the same layer."""
        own: dict[str, Any] = {
            "metric": self.metric,
            "seconds": round(self.seconds, 3),
            "importance": {str(layer): value for layer, value in sorted(self.importance.items())},
        }
        if self.evaluations:
            own["evaluations"] = {str(layer): e.to_json() for layer, e in sorted(self.evaluations.items())}
        if self.cheap:
            own["cheap"] = self.cheap.to_json()
            own["cheap_chooses_same"] = self.cheap.ranked()[0] == self.ranked()[0]
        return own


def make_metric(name: str) -> Metric:
    """The metric of that name, or of a user's `module:Class`.

    Raises:
        InputError: there is none.
    """
    return resolve_class(name, METRICS, "metric")()


def text_batches(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[tuple[Tensor, Tensor]]:
    """The text that metrics read, as batches of token ids and masks, each [B, T]; none if the config has no text."""
    text = config.score.text or config.distill.text
    if not text:
        return []
    rows = load_rows(
        text,
        tokenizer,
        sequence_length=config.distill.sequence_length,
        max_tokens=config.score.tokens,
        seed=config.seed,
    )
    return rows.batches(config.score.batch_size)


def check_metrics(config: ScoreConfig, *, has_text: bool, has_tasks: bool) -> None:
    """Checks that every metric that a config names exists and has what it reads.

    Raises:
        InputError: unknown metric, or no text or tasks for it.
    """
    named = {"score.decide": config.decide}
    if config.shortlist:
        named["score.shortlist.by"] = config.shortlist.by
    for field_name, name in named.items():
        needs = make_metric(name).needs
        if "text" in needs and not has_text:
            raise InputError(f"{field_name}: {name} reads text, and none is given", hint="set score.text")
        if "tasks" in needs and not has_tasks:
            raise InputError(f"{field_name}: {name} needs tasks, and none are given", hint="list some under tasks")


def score_candidates(inputs: ScoringInputs, depth: Depth, config: ScoreConfig) -> LayerScores:
    """Scores the candidates: the cheap metric on all, the deciding one on its shortlist (or on all without one).

    Args:
        depth: which teacher layers the positions in `inputs` stand for.
    """
    cheap = None
    if config.shortlist and len(inputs.candidates) > config.shortlist.keep:
        cheap = _scores(config.shortlist.by, inputs, depth)
        kept = cheap.ranked()[: config.shortlist.keep]
        inputs = replace(inputs, candidates=sorted(depth.position(layer) for layer in kept))
    scores = _scores(config.decide, inputs, depth)
    scores.cheap = cheap
    return scores


def score_layers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: ScoreConfig,
    *,
    tasks: Sequence[Task] = (),
    batches: Sequence[tuple[Tensor, Tensor]] = (),
    aggregate: str = "mean",
) -> LayerScores:
    """Scores the layers of a model on its own: what would be lost if each were skipped.

    Args:
        config: which metric, which layers are protected.
        tasks: for metrics that need them, from `make_tasks`.
        batches: for metrics that read text, from `text_batches`.
    """
    depth, stack = Depth.full(len(Stack(model).layers)), Stack(model)
    candidates = depth.removable(config.protect.first, config.protect.last, config.protect.layers)
    if not candidates:
        raise InputError("no layer may be removed: all are protected", hint="protect fewer (score.protect)")
    inputs = ScoringInputs(stack, stack, tokenizer, candidates, batches, tasks, None, aggregate)
    return score_candidates(inputs, depth, config)


def _scores(name: str, inputs: ScoringInputs, depth: Depth) -> LayerScores:
    inputs = replace(inputs, evaluations={})
    started = time.monotonic()
    importance = make_metric(name).score(inputs)
    return LayerScores(
        metric=name,
        importance={depth.kept[position]: value for position, value in importance.items()},
        evaluations={depth.kept[position]: value for position, value in inputs.evaluations.items()},
        seconds=time.monotonic() - started,
    )


__all__ = [
    "METRICS",
    "LayerScores",
    "Metric",
    "ScoringInputs",
    "check_metrics",
    "make_metric",
    "score_candidates",
    "score_layers",
    "text_batches",
]
