"""Compares a runtime's answers with the student's own distributions, position by position.

Where a runtime gives the log-probabilities of K tokens only, both distributions are taken over these and, as one more
outcome, the rest. Their KL is never above the exact one, and close to it where the K tokens hold most probability.

Shapes: N positions of a chunk, P compared positions, K tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from layerpeel.export.verify.answers import UNTOLD, Answers, Question

REST_FLOOR = 1e-6  # added to both rests, so that rounding in one minus a sum has no weight


@dataclass(frozen=True)
class Comparison:
    """How far a runtime is from the student.

    Attributes:
        positions: [P'], those that could be compared: before the first token id that differs.
        kl: [P'], KL(student || runtime) in nats of the next token.
        same_top: [P'], whether both have the same most likely token.
        first_other_token: the first place in the text at which token ids differ; None if all are the same.
        token_ids: of the student, then of the runtime, from that place on: a few.
        greedy: the student's greedy continuation, and the runtime's, as text; None if there is none.
    """

    positions: list[int]
    kl: list[float]
    same_top: list[bool]
    first_other_token: int | None = None
    token_ids: tuple[list[int], list[int]] = ((), ())  # type: ignore[assignment]
    greedy: tuple[str, str] | None = None

    @property
    def mean_kl(self) -> float:
        return sum(self.kl) / len(self.kl) if self.kl else 0.0

    @property
    def same_top_share(self) -> float:
        return sum(self.same_top) / len(self.same_top) if self.same_top else 1.0

    @property
    def same_greedy(self) -> bool | None:
        """Whether one greedy text begins with the other, which may have ended first; None if there is none."""
        if self.greedy is None:
            return None
        student, other = self.greedy
        return bool(student and other) and (student.startswith(other) or other.startswith(student))


def compare_distributions(log_probs: Iterable[Tensor], answers: Answers) -> tuple[list[float], list[bool]]:
    """KL and agreement of the most likely token at each position.

    Args:
        log_probs: of the student, [N, V] for one chunk of positions after another.
    """
    kl: list[float] = []
    same_top: list[bool] = []
    for chunk in log_probs:
        rows = slice(len(kl), len(kl) + len(chunk))
        ids = torch.from_numpy(answers.top_ids[rows]).to(chunk.device)
        given = torch.from_numpy(answers.top_log_probs[rows]).to(chunk.device).double()
        kl += coarse_kl(chunk, ids, given).tolist()
        same_top += same_top_tokens(chunk, ids, given).tolist()
    return kl, same_top


def coarse_kl(log_probs: Tensor, ids: Tensor, given: Tensor) -> Tensor:
    """KL over some tokens and the rest as one more outcome.

    Args:
        log_probs: [N, V], of the student.
        ids: [N, K], tokens of which the runtime gives log-probabilities; those below 0, or V and above, are not used.
        given: [N, K], these.

    Returns:
        [N], in nats.
    """
    used = (ids >= 0) & (ids < log_probs.shape[1])
    student = log_probs.double().gather(1, ids.clamp(0, log_probs.shape[1] - 1)).masked_fill(~used, -torch.inf)
    given = given.masked_fill(~used, -torch.inf)
    rest, given_rest = ((1 - each.exp().sum(1)).clamp_min(0) + REST_FLOOR for each in (student, given))
    terms = torch.where(used, student.exp() * (student - given), 0.0).sum(1)
    return (terms + rest * (rest / given_rest).log()).clamp_min(0)


def same_top_tokens(log_probs: Tensor, ids: Tensor, given: Tensor) -> Tensor:
    """Whether the runtime's most likely token is the student's, or can be: [N] of bool.

    Args:
        log_probs, ids, given: as of `coarse_kl`; an id of `UNTOLD` stands for a token that the runtime did not name.
    """
    wanted = log_probs.argmax(-1, keepdim=True)
    is_wanted = ids == wanted
    is_best = given.masked_fill(~is_wanted, -torch.inf).amax(1) >= given.amax(1)
    return is_best | ((ids == UNTOLD).any(1) & ~is_wanted.any(1))


def first_difference(question: Question, answers: Answers) -> int | None:
    """The first place at which the runtime's token ids are not the student's; None if all are the same."""
    if answers.token_ids is None or answers.token_ids == question.token_ids:
        return None
    pairs = zip(question.token_ids, answers.token_ids, strict=False)
    shorter = min(len(question.token_ids), len(answers.token_ids))
    return next((place for place, (one, other) in enumerate(pairs) if one != other), shorter)
