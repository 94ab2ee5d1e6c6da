"""Losses on hidden states: at layers in training, and after the final norm (arXiv 2511.05085)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from layerpeel.losses.base import Loss, StepOutputs


class HiddenLoss(Loss):
    """The mean over real tokens of a distance, at the layers plus after the final norm."""

    layers: Literal["last", "all"] = "last"
    """Compare the output of the last trained layer (the paper), or the mean over all trained layers."""
    final: bool = True
    """Compare the output of the final norm, too."""

    @abstractmethod
    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of hidden states [N, D] in fp32: [N]."""

    def hidden_layers(self, trained: Sequence[int]) -> Sequence[int]:
        return trained[-1:] if self.layers == "last" else trained

    def __call__(self, outputs: StepOutputs) -> Tensor:
        there = self.hidden_layers(sorted(outputs.student_hidden))
        places = [(outputs.student_hidden[layer], outputs.teacher_hidden[layer], 1 / len(there)) for layer in there]
        if self.final:
            places.append((outputs.student_final, outputs.teacher_final, 1.0))
        mask, total = outputs.mask, torch.zeros((), device=outputs.mask.device)
        for student, teacher, share in places:
            total = total + share * self.distance(student[mask].float(), teacher[mask].float()).sum()
        return total / max(outputs.step_tokens, 1)
