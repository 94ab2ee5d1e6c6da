"""What a loss sees of a training step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from layerpeel.stack import Stack


@dataclass
class StepOutputs:
    """Teacher and student on one micro-batch.

    Attributes:
        student_final, teacher_final: [B, T, D], after the final norm.
        student_inner, teacher_inner: [B, T, D], the output of the last trained layer, and of the teacher layer that it
            stands for.
        mask: [B, T], True at real tokens.
        step_tokens: real tokens in the whole optimizer step, over all its micro-batches.
        micro_batches: micro-batches in the optimizer step.
        head: the stack whose head turns final hidden states into logits (teacher and student share it).
    """

    student_final: Tensor
    teacher_final: Tensor
    student_inner: Tensor
    teacher_inner: Tensor
    mask: Tensor
    step_tokens: int
    micro_batches: int
    head: Stack


class Loss(BaseModel, ABC):
    """A loss; its fields are its options in the config."""

    model_config = ConfigDict(extra="forbid")

    @abstractmethod
    def __call__(self, outputs: StepOutputs) -> Tensor:
        """The micro-batch's share of the step's loss: shares add up to the step's loss (a scalar)."""
