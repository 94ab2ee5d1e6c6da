"""Losses on hidden states: the outputs of trained layers, and of the final norm (arXiv 2511.05085)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from layerpeel.losses.base import Loss, StepOutputs


class HiddenLoss(Loss):
    """A distance between hidden states, mean over real tokens: that of the layers plus that after the final norm."""

    layers: Literal["last", "all"] = "last"
    """Compare the output of the last trained layer (the paper), or the mean over all trained layers."""
    final: bool = True
    """Compare the output of the final norm, too."""

    @abstractmethod
    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The distance at each of N real tokens: hidden states [N, D] in fp32 -> [N]."""

    def hidden_layers(self, trained: Sequence[int]) -> Sequence[int]:
        return trained[-1:] if self.layers == "last" else trained

    def __call__(self, outputs: StepOutputs) -> Tensor:
        layers = self.hidden_layers(sorted(outputs.student_hidden))
        pairs = [(outputs.student_hidden[layer], outputs.teacher_hidden[layer], 1 / len(layers)) for layer in layers]
        if self.final:
            pairs.append((outputs.student_final, outputs.teacher_final, 1.0))
        token_index, total = outputs.token_index, torch.zeros((), device=outputs.mask.device)
        for student, teacher, weight in pairs:
            total = total + weight * self.distance(student[token_index].float(), teacher[token_index].float()).sum()
        return total / max(outputs.step_tokens, 1)
