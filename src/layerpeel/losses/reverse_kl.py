"""Reverse KL, KL(student || teacher): the student stays where the teacher is sure (MiniLLM, arXiv 2306.08543)."""

from __future__ import annotations

from torch import Tensor

from layerpeel.losses.logits import Divergence


class ReverseKL(Divergence):
    """KL(student || teacher) on the logits, over real tokens."""

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student.exp() * (student - teacher)).sum(-1)

    def between_and_grad(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        probability, ratio = student.exp(), student.sub_(teacher)
        values = (probability * ratio).sum(-1, keepdim=True)
        return values.sum(), ratio.sub_(values).mul_(probability)
