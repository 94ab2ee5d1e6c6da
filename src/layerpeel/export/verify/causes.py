"""What is likely to be wrong, from where in the text a runtime errs.

A wrong rotary base turns the angles between far tokens more than between near ones, so its error grows with position,
from next to nothing at the first token, which attends to nothing but itself. A wrong window does nothing until the text
is longer than it. A wrong head, embedding or norm errs at every position alike, at the first one too.
"""

from __future__ import annotations

import math

import numpy as np

FIRST = 8  # positions at which attention has hardly anything to attend to
LEAST_BEFORE_STEP = 16
FLOOR = 1e-9

TOKENIZER = "tokenizer: it gives other token ids for the same text, so the model reads another text"
HEAD = (
    "head: the error is there from the first token on and the same at all positions, as of a head that is wrong or "
    "written beside tied embeddings, or of a wrong embedding, norm, scale or weight"
)
ROPE = "rope base: the error grows with position from next to nothing, as of a wrong rope_theta or rotary scaling"
WINDOW = "window pattern: the error begins at token {place}, as where layers attend to a window of another length"
KEPT_WINDOW = "window pattern: the error begins beyond the window of {place} tokens, as where other layers have it"


def cause_of_error(positions: list[int], kl: list[float], limit: float, windows: list[int]) -> str | None:
    """The likely cause of an error above the limit, by its pattern; None if it has none, or there is none.

    Args:
        positions, kl: where, and how far; ascending.
        limit: what rounding explains, as a mean.
        windows: lengths of the student's attention windows, if it has any.
    """
    places, error = np.array(positions), np.array(kl) + FLOOR
    if len(error) < 4 * FIRST:
        return None
    for window in windows:
        before, after = error[places < window], error[places >= window]
        enough = len(after) >= FIRST and len(before) >= FIRST
        if enough and before.mean() <= limit < after.mean() / 2 and not _grows(before, limit / 10):
            return KEPT_WINDOW.format(place=window)
    if error.mean() <= limit:
        return None
    if (step := _step(places, error, limit)) is not None:
        return WINDOW.format(place=step)
    if np.median(error[:FIRST]) >= 0.3 * np.median(error):
        return HEAD
    return ROPE if _grows(error, limit) else None


def _step(places: np.ndarray, error: np.ndarray, limit: float) -> int | None:
    """The position from which on the error is many times what it was, and before which it did not grow; or None."""
    logs = np.log(error)
    counts = np.arange(1, len(logs))
    sums, squares = np.cumsum(logs), np.cumsum(logs**2)
    left = squares[:-1] - sums[:-1] ** 2 / counts
    right = (squares[-1] - squares[:-1]) - (sums[-1] - sums[:-1]) ** 2 / (len(logs) - counts)
    split = int(np.argmin(left + right)) + 1
    if split < LEAST_BEFORE_STEP or len(logs) - split < LEAST_BEFORE_STEP:
        return None
    jump = logs[split:].mean() - logs[:split].mean()
    if jump < math.log(10) or error[:split].mean() > limit or _grows(error[:split], limit / 10):
        return None
    return int(places[split])


def _grows(error: np.ndarray, least: float) -> bool:
    """Whether the last third errs several times more than the first positions, and by more than `least`."""
    third = error[len(error) * 2 // 3 :]
    return bool(np.median(third) > 3 * np.median(error[:FIRST]) and third.mean() > least)
