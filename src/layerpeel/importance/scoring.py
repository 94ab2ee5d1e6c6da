"""Scores the layers of a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.config.run import RunConfig
from layerpeel.config.score import ScoreConfig
from layerpeel.data.batches import load_rows
from layerpeel.data.rows import Rows
from layerpeel.data.token_store import TokenStore
from layerpeel.errors import InputError
from layerpeel.importance.base import ScoringInputs
from layerpeel.importance.estimate import Estimate, estimate
from layerpeel.importance.metrics import make_metric
from layerpeel.importance.scores import LayerScores
from layerpeel.importance.work import work_of
from layerpeel.inference.answer_cache import AnswerCache
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.config_check import unremovable_layers
from layerpeel.model.layer_cycles import cycle_breakers
from layerpeel.model.surgery import KeptLayers
from layerpeel.processes.progress import print_once
from layerpeel.tasks.base import Task
from layerpeel.tasks.evaluation import refuse_generation


def scoring_text(config: RunConfig, tokenizer: PreTrainedTokenizerBase, texts: TokenStore | None = None) -> Rows | None:
    """The text that metrics read, from `texts` as `load_rows` has it; None if the config has no text."""
    text = config.score.text or config.distill.text
    if not text:
        return None
    return load_rows(
        text,
        tokenizer,
        sequence_length=config.distill.sequence_length,
        max_tokens=config.score.tokens,
        seed=config.seed,
        texts=texts,
    )


def score_candidates(inputs: ScoringInputs, depth: KeptLayers) -> LayerScores:
    """Scores all candidates by the shortlist's metric, then those on the shortlist (all without one) by `decide`.

    Args:
        depth: the student's layers, to translate positions into the teacher's indices.
    """
    config = inputs.config
    if config.race and not make_metric(config.decide).races:
        print_once(f"score.race: {config.decide} scores all candidates to the end; task_quality and teacher_kl race")
    cheap = None
    if config.shortlist and len(inputs.candidates) > config.shortlist.keep:
        cheap = _scores(config.shortlist.by, inputs, depth)
        kept = cheap.ranked()[: config.shortlist.keep]
        inputs = inputs.among(sorted(depth.position(layer) for layer in kept))
    scores = _scores(config.decide, inputs, depth)
    scores.cheap = cheap
    return scores


def score_layers(
    model: PreTrainedModel | LayerwiseModel,
    tokenizer: PreTrainedTokenizerBase,
    config: ScoreConfig,
    *,
    tasks: Sequence[Task] = (),
    text: Rows | None = None,
    aggregate: str = "mean",
    answer_cache: AnswerCache | None = None,
    announce: Callable[[list[Estimate]], None] | None = None,
) -> LayerScores:
    """Scores the layers of a model, with the model itself as the teacher.

    Args:
        model: a causal language model, or a `LayerwiseModel` whose layers are streamed (`streaming.load_streamed`).
        config: the metrics, and the layers that are protected.
        tasks: for metrics that run tasks, from `make_tasks`.
        text: for metrics that read text, from `scoring_text`.
        aggregate: how the tasks' scores are combined: `mean` or `relative`.
        answer_cache: keeps answers on disk, so that an interrupted scoring resumes.
        announce: called with the estimates before the work begins.

    Raises:
        InputError: all layers are protected, or a streamed model would have to generate.
    """
    layerwise = model if isinstance(model, LayerwiseModel) else LayerwiseModel(model)
    depth = KeptLayers.full(len(layerwise.layers))
    fixed = unremovable_teacher_layers(layerwise.model, depth, pattern=config.protect.pattern)
    protected = [*config.protect.layers, *fixed]
    candidates = depth.removable(config.protect.first, config.protect.last, protected)
    if not candidates:
        raise InputError("no layer may be removed: all are protected", hint="protect fewer (score.protect)")
    inputs = ScoringInputs(
        layerwise, layerwise, tokenizer, candidates, text, tasks, None, aggregate, config, answer_cache
    )
    if layerwise.streamed and "tasks" in make_metric(config.decide).needs:
        refuse_generation(tasks, tokenizer)
    if announce:
        announce(estimate(inputs))
    return score_candidates(inputs, depth)


def unremovable_teacher_layers(model: PreTrainedModel, depth: KeptLayers, *, pattern: bool = False) -> tuple[int, ...]:
    """The teacher layers without which the model could not be saved, as no config describes it; prints why, once.

    Args:
        pattern: whether those count, too, without which the cycle of the model's layers would break.
    """
    by_position = (cycle_breakers(model.config) if pattern else {}) | unremovable_layers(model)
    reasons = {depth.kept[position]: reason for position, reason in sorted(by_position.items())}
    if reasons:
        print_once(f"layers {', '.join(map(str, reasons))} stay: without one, {next(iter(reasons.values()))}")
    return tuple(reasons)


def _scores(name: str, inputs: ScoringInputs, depth: KeptLayers) -> LayerScores:
    started, metric = time.monotonic(), make_metric(name)
    result = metric.score(inputs)

    def by_layer(values: dict[int, Any]) -> dict[int, Any]:
        return {depth.kept[position]: value for position, value in values.items()}

    return LayerScores(
        metric=name,
        importance=by_layer(result.importance),
        stderr=by_layer(result.stderr),
        evaluations=by_layer(result.evaluations),
        dropped=by_layer(result.dropped),
        seconds=time.monotonic() - started,
        layer_tokens=work_of(metric, inputs, inputs.candidates).layer_tokens,
        memory=inputs.budget.bytes,
        memory_halved=inputs.budget.halved,
    )
