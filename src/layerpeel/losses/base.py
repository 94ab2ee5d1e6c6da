"""Base class of losses, and what a loss is given of a training step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from layerpeel.inference.layerwise import LayerwiseModel

NO_LABEL = -100


@dataclass
class StepOutputs:
    """Teacher and student on one micro-batch.

    Attributes:
        student_final, teacher_final: [B, T, D], after the final norm.
        student_hidden, teacher_hidden: [B, T, D] by teacher layer: the output of the student's layer, and of the
            teacher layer whose output it is trained to give; of the layers that `Loss.hidden_layers` names.
        mask: [B, T], True at real tokens.
        labels: [B, T], the next token of the text; NO_LABEL where there is none.
        student_head, teacher_head: the models whose heads turn final hidden states into logits.
        step_tokens, step_labels: real tokens, and labels, in all micro-batches of the optimizer step.
    """

    student_final: Tensor
    teacher_final: Tensor
    student_hidden: Mapping[int, Tensor]
    teacher_hidden: Mapping[int, Tensor]
    mask: Tensor
    labels: Tensor
    student_head: LayerwiseModel
    teacher_head: LayerwiseModel
    step_tokens: int
    step_labels: int

    @cached_property
    def token_index(self) -> tuple[Tensor, ...]:
        """Rows and columns of the N real tokens, [N] each: an index like `mask`, for which a GPU is waited for once."""
        return self.mask.nonzero(as_tuple=True)


class Loss(BaseModel, ABC):
    """A loss; its fields are its options in the config."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def hidden_layers(self, trained: Sequence[int]) -> Sequence[int]:
        """The layers whose outputs the loss reads, of those in training (teacher indices, ascending)."""
        return ()

    @abstractmethod
    def __call__(self, outputs: StepOutputs) -> Tensor:
        """The micro-batch's share of the step's loss, a scalar; the shares of all micro-batches add up to it."""
