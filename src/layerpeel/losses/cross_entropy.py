"""Cross-entropy on the text itself, as in pretraining."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from layerpeel.losses.base import NO_LABEL, StepOutputs
from layerpeel.losses.logits import LogitLoss


class CrossEntropy(LogitLoss):
    """-log of the student's probability of the next token, over the tokens that have one."""

    reads_teacher: ClassVar[bool] = False

    def value(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(student_logits, labels, ignore_index=NO_LABEL, reduction="none")

    def value_and_grad(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        labelled = labels != NO_LABEL
        target = labels.where(labelled, 0)[:, None]
        log_probs = student_logits.log_softmax(-1)
        value = -(log_probs.gather(-1, target)[:, 0] * labelled).sum()
        grad_logits = log_probs.exp_()
        grad_logits.scatter_add_(-1, target, grad_logits.new_full(target.shape, -1.0))
        return value, grad_logits.mul_(labelled[:, None])

    def step_count(self, outputs: StepOutputs) -> int:
        return outputs.step_labels
