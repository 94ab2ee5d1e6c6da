"""Cosine distance on hidden states, their direction alone (DistilBERT, arXiv 1910.01108)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from layerpeel.losses.hidden import HiddenLoss


class HiddenCosine(HiddenLoss):
    """1 - cosine between student and teacher."""

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        return 1 - functional.cosine_similarity(student, teacher, dim=-1)
