"""What scoring will take, said before it begins."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from layerpeel.importance.base import ScoringInputs
from layerpeel.importance.metrics import make_metric
from layerpeel.importance.work import work_of
from layerpeel.inference.budget import bytes_of_token
from layerpeel.inference.layerwise import LayerwiseModel


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
        work = work_of(make_metric(name), inputs, inputs.candidates[:candidates])
        seconds = work.layer_tokens * per_layer + work.head_tokens * per_logit
        each = bytes_of_token(1 + candidates, inputs.student.width, inputs.student.model.dtype.itemsize)
        needed = min(work.tokens * each, inputs.budget.bytes)
        estimates.append(Estimate(name, work.tokens, work.layer_runs, work.one_by_one, seconds, needed))
    return estimates


@torch.no_grad()
def _time_a_token(layerwise: LayerwiseModel) -> tuple[float, float]:
    """Seconds for a token in a layer, and in the head."""
    rows = min(256, layerwise.logit_rows())
    hidden, arguments = layerwise.begin(torch.zeros(4, 128, dtype=torch.long))
    few = hidden.flatten(0, 1)[:rows]
    times: list[tuple[float, float]] = []
    with layerwise.weights_loaded(0):
        for _ in range(3):
            started = time.perf_counter()
            layerwise.layer(0, hidden, arguments[0])
            between = time.perf_counter()
            layerwise.logits(few).logsumexp(-1).sum().item()
            times.append((between - started, time.perf_counter() - between))
    layers, heads = zip(*times, strict=True)
    return min(layers) / 512, min(heads) / rows
