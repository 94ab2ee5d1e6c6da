"""Mean squared error on hidden states (arXiv 2511.05085)."""

from __future__ import annotations

from torch import Tensor

from layerpeel.losses.hidden import HiddenLoss


class HiddenMSE(HiddenLoss):
    """Squared error between student and teacher, mean over D."""

    relative: bool = True
    """Divide each token's error by the teacher's mean square at that token. Some tokens, above all the first one,
    have hidden states a thousand times larger than the rest, and would dominate a plain mean, or one divided by the
    batch's mean square."""

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        error = (student - teacher).square().mean(-1)
        return error / teacher.square().mean(-1).clamp_min(1e-12) if self.relative else error
