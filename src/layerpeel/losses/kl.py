"""Forward KL, KL(teacher || student).

Kovalev and Tikhomirov (arXiv 2511.05085) sum it over positions and vocabulary and divide by 100; Minitron
(arXiv 2407.14679) and this package's default take the mean over tokens.
"""

from __future__ import annotations

from torch import Tensor

from layerpeel.losses.logits import Divergence


class KL(Divergence):
    """KL(teacher || student) on the logits, over real tokens."""

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (teacher.exp() * (teacher - student)).sum(-1)

    def between_and_grad(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        probability = teacher.exp()
        value = (teacher.sub_(student).mul_(probability)).sum()
        return value, student.exp_().sub_(probability)
