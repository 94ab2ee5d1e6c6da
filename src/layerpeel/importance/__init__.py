"""Layer importance, one metric a file; what each reads of the model comes from one walk over its layers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from layerpeel.config import RunConfig, ScoreConfig
from layerpeel.data import Rows, load_rows
from layerpeel.errors import InputError, reason_of, resolve_class
from layerpeel.expressible import fixed_layers
from layerpeel.importance.base import Findings, Metric, ScoringInputs
from layerpeel.importance.block_influence import BlockInfluence
from layerpeel.importance.scores import LayerScores, last_ranking
from layerpeel.importance.task_quality import TaskQuality
from layerpeel.importance.teacher_kl import TeacherKL
from layerpeel.importance.work import Work, count_work
from layerpeel.progress import console, shown
from layerpeel.stack import Stack
from layerpeel.surgery import Depth
from layerpeel.tasks import Task
from layerpeel.tasks.base import Generation
from layerpeel.tasks.store import AnswerStore

METRICS: dict[str, type[Metric]] = {
    "task_quality": TaskQuality,
    "teacher_kl": TeacherKL,
    "block_influence": BlockInfluence,
}


def make_metric(name: str) -> Metric:
    """The metric of that name, or of a user's `module:Class`.

    Raises:
        InputError: there is none.
    """
    found = resolve_class(name, METRICS, "metric", Metric)
    try:
        metric: Metric = found()
    except Exception as error:  # of a user's own class
        raise InputError(
            f"metric '{name}' cannot be made ({reason_of(error)})", hint="it is called without arguments"
        ) from None
    return metric


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
        inputs = replace(inputs, candidates=sorted(depth.position(layer) for layer in kept))
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


@dataclass(frozen=True)
class Estimate:
    """What a metric will take.

    Attributes:
        metric: its name.
        tokens: tokens of the text or the tasks.
        layer_runs: how often a layer runs on each of them, over all candidates.
        one_by_one: how often it would, if each candidate were removed and run.
        seconds: about how long, by the time of one layer and of the head on a few tokens.
        memory: bytes beside those of the weights, at most.
    """

    metric: str
    tokens: int
    layer_runs: int
    one_by_one: int
    seconds: float
    memory: int


def estimate(inputs: ScoringInputs) -> list[Estimate]:
    """What scoring will take, from counting tokens and timing one layer and the head; racing may take less."""
    config, count = inputs.config, len(inputs.candidates)
    short = config.shortlist is not None and count > config.shortlist.keep
    steps = [(config.shortlist.by, count)] if short and config.shortlist else []
    steps.append((config.decide, config.shortlist.keep if short and config.shortlist else count))
    per_layer, per_logit = _time_a_token(inputs.student)
    estimates = []
    for name, candidates in steps:
        work = _work(name, replace(inputs, candidates=inputs.candidates[:candidates]))
        seconds = work.layer_tokens * per_layer + work.head_tokens * per_logit
        needed = min(work.tokens * inputs.budget.bytes_of_token(inputs.student, 1 + candidates), inputs.budget.bytes)
        estimates.append(Estimate(name, work.tokens, work.layer_runs, work.one_by_one, seconds, needed))
    return estimates


def _work(name: str, inputs: ScoringInputs) -> Work:
    metric = make_metric(name)
    samples = inputs.samples.values() if "tasks" in metric.needs else ()
    return count_work(
        metric, len(inputs.student.layers), inputs.candidates, int(inputs.text.mask.sum()) if inputs.text else 0,
        [request for task in samples for own in task for request in own],
        0 if inputs.teacher is inputs.student else len(inputs.teacher.layers),
    )  # fmt: skip


@torch.no_grad()
def _time_a_token(stack: Stack) -> tuple[float, float]:
    """Seconds for a token in a layer, and in the head."""
    rows = min(256, stack.logit_rows())
    hidden, arguments = stack.begin(torch.zeros(4, 128, dtype=torch.long))
    few = hidden.flatten(0, 1)[:rows]
    times: list[tuple[float, float]] = []
    with stack.resident(0):
        for _ in range(3):
            started = time.perf_counter()
            stack.layer(0, hidden, arguments[0])
            between = time.perf_counter()
            stack.logits(few).logsumexp(-1).sum().item()
            times.append((between - started, time.perf_counter() - between))
    layers, heads = zip(*times, strict=True)
    return min(layers) / 512, min(heads) / rows


def _scores(name: str, inputs: ScoringInputs, depth: Depth) -> LayerScores:
    started = time.monotonic()
    found = make_metric(name).score(inputs)

    def by_layer(values: dict[int, Any]) -> dict[int, Any]:
        return {depth.kept[position]: value for position, value in values.items()}

    return LayerScores(
        metric=name,
        importance=by_layer(found.importance),
        stderr=by_layer(found.stderr),
        evaluations=by_layer(found.evaluations),
        dropped=by_layer(found.dropped),
        seconds=time.monotonic() - started,
        layer_tokens=_work(name, inputs).layer_tokens,
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
