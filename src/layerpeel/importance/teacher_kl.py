"""How far the next-token distribution moves from the teacher's when a layer is skipped.

The fitness of EvoPress (arXiv 2410.14649): cheap, and close to what tasks would say.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from layerpeel.importance.text_metrics import DistributionMetric


class TeacherKL(DistributionMetric):
    """KL(teacher || student with the layer skipped), mean over real tokens, less that of the student as it is."""

    def measure(self, student: Tensor, teacher: Tensor) -> Tensor:
        return functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
