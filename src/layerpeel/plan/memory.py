"""Bytes on a device, by what they are for."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence

import psutil

from layerpeel.config.distill import DistillConfig
from layerpeel.config.score import ScoreConfig
from layerpeel.inference.budget import bytes_of_token
from layerpeel.inference.layerwise import logit_rows_at_a_time, tokens_per_call
from layerpeel.inference.requests import Generation, LogLikelihood, Request
from layerpeel.losses.logits import BYTES_IN_CACHE
from layerpeel.plan.shape import Shape

STATES = 12  # hidden states [B, T, D] in fp32: final ones of both models, those compared, their copies and gradients
LOGIT_TENSORS = 5  # of the size of a chunk of logits, in fp32, that a divergence makes of them
AT_ONCE = 0.5  # of what a layer keeps for its backward pass, what is there at a time while it runs without one
UNUSED_ON_CPU = 0.4  # of what comes and goes, what malloc leaves between tensors; measured where that was 440 MB


def training_memory(
    shape: Shape, distill: DistillConfig, trained: int, graph: int, device: str, split: int
) -> dict[str, float]:
    """While a round trains.

    Args:
        trained: parameters that train.
        graph: layers of the student that gradients go through.
        split: over how many devices what trains is split (FSDP2).
    """
    if not trained:
        return {"weights": float(shape.parameters * shape.itemsize)}
    tokens = distill.batch_size * distill.sequence_length
    kept = shape.kept * tokens
    if distill.activation_checkpointing:
        activations = graph * tokens * shape.width * shape.itemsize + kept
    else:
        activations = graph * kept
    activations += max(kept, logit_bytes(shape, device))  # a layer runs, or the losses
    activations += STATES * tokens * shape.width * 4
    gradients = 4 * trained / split
    beside = activations + (gradients if distill.accumulation > 1 else 0)  # a step's first backward finds none
    parts = {
        "weights": float(shape.parameters * shape.itemsize),
        "trained copies in fp32": 4 * trained / split,
        "AdamW": 8 * trained / split,
        "gradients": gradients,
        "activations, hidden states and chunks of logits": max(0.0, beside - gradients),
    }
    if device == "cpu":  # elsewhere they are in the host's memory
        parts["weights as they were, to start a round again"] = float(shape.itemsize * trained)
    return parts | _unused(activations, device)


def resident_bytes() -> float:
    """Of this process, without what has been freed and not given back, where libc can tell."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
    return float(psutil.Process().memory_info().rss)


def _unused(changing: float, device: str) -> dict[str, float]:
    """What an allocator keeps beside tensors that come and go."""
    return {"unused, between tensors": UNUSED_ON_CPU * changing} if device == "cpu" else {}


def logit_bytes(shape: Shape, device: str) -> float:
    """Chunks of logits of both models, and what the losses make of them."""
    rows = logit_rows_at_a_time(shape.vocabulary, device) // 2
    made = BYTES_IN_CACHE if device == "cpu" else 4 * rows * shape.vocabulary
    return float(2 * rows * shape.vocabulary * shape.itemsize + LOGIT_TENSORS * made)


def scoring_memory(
    shape: Shape,
    score: ScoreConfig,
    requests: Sequence[Sequence[Request]],
    trained: int,
    streams: Mapping[str, int],
    budget: int,
    device: str,
) -> dict[str, float]:
    """While the student is scored.

    Args:
        trained: parameters that the student has of its own.
        streams: of `text` and of `tasks`, the student as it is included.
        budget: bytes that streams may take.
    """
    fit = {
        need: budget // bytes_of_token(max(1, count), shape.width, shape.itemsize) for need, count in streams.items()
    }
    hidden = shape.width * shape.itemsize

    def walk(tokens: int) -> float:
        """What enters a layer and what leaves it, of that many tokens on all streams, and what a part needs in it."""
        return 2 * tokens * hidden + AT_ONCE * min(tokens, tokens_per_call(shape.width, device)) * shape.kept

    needs = [walk(min(fit["text"], score.tokens) * streams["text"])]
    for own in requests:
        read = sum(len(r.context) + len(r.continuation) for r in own if isinstance(r, LogLikelihood))
        needs.append(walk(min(fit["tasks"], read) * streams["tasks"]))
        written = [request for request in own if isinstance(request, Generation)]
        if not written:
            continue
        prompt, new = max(len(r.prompt) for r in written), max(r.max_new_tokens for r in written)
        rows = min(len(written), max(1, fit["tasks"] // (prompt + new))) * streams["tasks"]
        cache = rows * (prompt + new) * shape.cache * shape.layers
        left = cache * (1 + 1 / streams["tasks"]) / 2  # keys of a walk: on average, streams begin in the middle
        needs.append(max(walk(rows * (prompt + new)) + left, cache))
    logits = 2 * 4 * logit_rows_at_a_time(shape.vocabulary, device) * shape.vocabulary
    return {
        "weights": float(shape.parameters * shape.itemsize),
        "the student's own": float(trained * shape.itemsize),
        "streams of candidates and their caches": float(max(needs)),
        "chunks of logits": float(logits),
    } | _unused(max(needs) + logits, device)
