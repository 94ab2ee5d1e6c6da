"""Cross-entropy on the text itself, as in pretraining."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from layerpeel.losses.base import StepOutputs
from layerpeel.losses.logits import LogitLoss


class CrossEntropy(LogitLoss):
    """-log of the student's probability of the next token, over the tokens that have one."""

    reads_teacher: ClassVar[bool] = False

    def measure(self, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        known = labels >= 0
        target = labels.clamp_min(0)[:, None]
        logs = student.log_softmax(-1)
        value = -(logs.gather(-1, target)[:, 0] * known).sum()
        grad_logits = logs.exp_()
        grad_logits.scatter_add_(-1, target, grad_logits.new_full(target.shape, -1.0))
        return value, grad_logits.mul_(known[:, None])

    def step_count(self, outputs: StepOutputs) -> int:
        return outputs.step_labels
