"""Layer importance, one metric a file; what each reads of the model comes from one walk over its layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.config import RunConfig, ScoreConfig
from layerpeel.data import Rows, load_rows
from layerpeel.errors import InputError
from layerpeel.expressible import fixed_layers
from layerpeel.importance.base import Findings, Metric, ScoringInputs
from layerpeel.importance.estimate import Estimate, estimate
from layerpeel.importance.metrics import METRICS, check_metrics, make_metric
from layerpeel.importance.scores import LayerScores, last_ranking
from layerpeel.importance.work import Work, count_work, work_of
from layerpeel.progress import console, shown
from layerpeel.stack import Stack
from layerpeel.surgery import Depth
from layerpeel.tasks import Task
from layerpeel.tasks.base import Generation
from layerpeel.tasks.store import AnswerStore


def scoring_text(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Rows | None:
    """The text that metrics read; None if the config has no text."""
    text = config.score.text or config.distill.text
    if not text:
        return None
    return load_rows(
        text,
        tokenizer,
        sequence_length=config.distill.sequence_length,
        max_tokens=config.score.tokens,
        seed=config.seed,
    )


def score_candidates(inputs: ScoringInputs, depth: Depth) -> LayerScores:
    """Scores the candidates: the cheap metric on all, the deciding one on its shortlist (or on all without one).

    Args:
        depth: which teacher layers the positions in `inputs` stand for.
    """
    config = inputs.config
    cheap = None
    if config.shortlist and len(inputs.candidates) > config.shortlist.keep:
        cheap = _scores(config.shortlist.by, inputs, depth)
        kept = cheap.ranked()[: config.shortlist.keep]
        inputs = inputs.among(sorted(depth.position(layer) for layer in kept))
    scores = _scores(config.decide, inputs, depth)
    scores.cheap = cheap
    return scores


def score_layers(
    model: PreTrainedModel | Stack,
    tokenizer: PreTrainedTokenizerBase,
    config: ScoreConfig,
    *,
    tasks: Sequence[Task] = (),
    text: Rows | None = None,
    aggregate: str = "mean",
    store: AnswerStore | None = None,
    announce: Callable[[list[Estimate]], None] | None = None,
) -> LayerScores:
    """Scores the layers of a model on its own: what would be lost if each were skipped.

    Args:
        model: a causal language model, or the stack of one whose layers are streamed (`streaming.load_streamed`).
        config: which metric, which layers are protected.
        tasks: for metrics that need them, from `make_tasks`.
        text: for metrics that read text, from `scoring_text`.
        store: where to look for answers that were given before, and to keep new ones.
        announce: called with the estimate before the work begins.

    Raises:
        InputError: all layers are protected, or a streamed model would have to generate.
    """
    stack = model if isinstance(model, Stack) else Stack(model)
    depth = Depth.full(len(stack.layers))
    protected = [*config.protect.layers, *fixed_by_config(stack.model, depth)]
    candidates = depth.removable(config.protect.first, config.protect.last, protected)
    if not candidates:
        raise InputError("no layer may be removed: all are protected", hint="protect fewer (score.protect)")
    inputs = ScoringInputs(stack, stack, tokenizer, candidates, text, tasks, None, aggregate, config, store)
    if stack.streamed and "tasks" in make_metric(config.decide).needs:
        _refuse_generation(tasks, tokenizer)
    if announce:
        announce(estimate(inputs))
    return score_candidates(inputs, depth)


def fixed_by_config(model: PreTrainedModel, depth: Depth) -> tuple[int, ...]:
    """The teacher layers that may not go next, as the config could not express what is left; says why, once."""
    fixed = {depth.kept[position]: reason for position, reason in fixed_layers(model).items()}
    if fixed:
        _say_once(f"layers {', '.join(map(str, fixed))} stay: without one, {next(iter(fixed.values()))}")
    return tuple(fixed)


@cache
def _say_once(text: str) -> None:
    console.print(shown(text), style="dim")


def _refuse_generation(tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase) -> None:
    for task in tasks:
        if any(isinstance(request, Generation) for own in task.requests(tokenizer) for request in own):
            raise InputError(
                f"task {task.name} generates text, for which every layer would be read from disk for every token",
                hint="score it with score.weights: memory, or leave it out; log-likelihood tasks can be streamed",
            )


def _scores(name: str, inputs: ScoringInputs, depth: Depth) -> LayerScores:
    started, metric = time.monotonic(), make_metric(name)
    found = metric.score(inputs)

    def by_layer(values: dict[int, Any]) -> dict[int, Any]:
        return {depth.kept[position]: value for position, value in values.items()}

    return LayerScores(
        metric=name,
        importance=by_layer(found.importance),
        stderr=by_layer(found.stderr),
        evaluations=by_layer(found.evaluations),
        dropped=by_layer(found.dropped),
        seconds=time.monotonic() - started,
        layer_tokens=work_of(metric, inputs, inputs.candidates).layer_tokens,
        memory={"memory": inputs.budget.bytes, "memory_halved": inputs.budget.halved},
    )


__all__ = [
    "METRICS",
    "Estimate",
    "Findings",
    "LayerScores",
    "Metric",
    "ScoringInputs",
    "Work",
    "check_metrics",
    "count_work",
    "estimate",
    "fixed_by_config",
    "last_ranking",
    "make_metric",
    "score_candidates",
    "score_layers",
    "scoring_text",
]
