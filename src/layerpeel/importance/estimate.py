"""Estimates of what a scoring will cost, before it begins."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from layerpeel.importance.base import ScoringInputs
from layerpeel.importance.metrics import make_metric
from layerpeel.importance.work import work_of
from layerpeel.inference.budget import bytes_of_token
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.config_fields import context_length
from layerpeel.model.devices import synchronize


@dataclass(frozen=True)
class Estimate:
    """The cost of one metric.

    Attributes:
        metric: its name.
        tokens: tokens of the text or the tasks.
        layer_runs: layer calls for each token, over all candidates.
        one_by_one: layer calls for each token if every candidate were removed and run by itself.
        seconds: estimated from the time of one layer and of the head on a short batch.
        memory: upper bound in bytes, without the weights.
    """

    metric: str
    tokens: int
    layer_runs: int
    one_by_one: int
    seconds: float
    memory: int


def estimate(inputs: ScoringInputs) -> list[Estimate]:
    """Estimates each metric's cost by counting tokens and timing one layer and the head; racing may take less."""
    config, count = inputs.config, len(inputs.candidates)
    shortlist = config.shortlist if config.shortlist and count > config.shortlist.keep else None
    steps = [(shortlist.by, count)] if shortlist else []
    steps.append((config.decide, shortlist.keep if shortlist else count))
    per_layer, per_logit = _seconds_per_token(inputs.student)
    estimates = []
    for name, candidates in steps:
        work = work_of(make_metric(name), inputs, inputs.candidates[:candidates])
        seconds = work.layer_tokens * per_layer + work.head_tokens * per_logit
        bytes_per_token = bytes_of_token(1 + candidates, inputs.student.width, inputs.student.model.dtype.itemsize)
        memory = min(work.tokens * bytes_per_token, inputs.budget.bytes)
        estimates.append(Estimate(name, work.tokens, work.layer_runs, work.one_by_one, seconds, memory))
    return estimates


@torch.no_grad()
def _seconds_per_token(layerwise: LayerwiseModel) -> tuple[float, float]:
    """Seconds for one token in a layer, and in the head: the best of three."""
    rows = min(256, layerwise.logit_rows())
    width = min(128, context_length(layerwise.model.config) or 128)
    hidden, arguments = layerwise.begin(torch.zeros(4, width, dtype=torch.long))
    head_input = hidden.flatten(0, 1)[:rows]
    times: list[tuple[float, float]] = []
    with layerwise.weights_loaded(0):
        for _ in range(3):
            synchronize(layerwise.device)
            started = time.perf_counter()
            layerwise.layer(0, hidden, arguments[0])
            synchronize(layerwise.device)
            layer_ended = time.perf_counter()
            layerwise.logits(head_input).logsumexp(-1).sum().item()
            times.append((layer_ended - started, time.perf_counter() - layer_ended))
    layers, heads = zip(*times, strict=True)
    return min(layers) / (4 * width), min(heads) / len(head_input)
