"""Jensen-Shannon divergence: bounded and symmetric (GKD, arXiv 2306.13649, at beta = 1/2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from layerpeel.losses.logits import Divergence


class JensenShannon(Divergence):
    """Mean of the KL of either model to their even mixture, on the logits, over real tokens."""

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        mixture = torch.logaddexp(student, teacher) - math.log(2)
        return (student.exp() * (student - mixture) + teacher.exp() * (teacher - mixture)).sum(-1) / 2

    def between_and_grad(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        mixture = torch.logaddexp(student, teacher).sub_(math.log(2))
        probability, ratio = student.exp(), student.sub_(mixture)
        values = (probability * ratio).sum(-1, keepdim=True)
        from_teacher = (teacher.exp() * teacher.sub(mixture)).sum()
        return (values.sum() + from_teacher) / 2, ratio.sub_(values).mul_(probability).mul_(0.5)
