"""Losses on the logits, from the final hidden states, without vocabulary-sized logits for a batch.

Positions go through the head in chunks, and value and gradient are found in the same sweep, for all such losses at
once; nothing of vocabulary size outlives its chunk. The gradient goes to the head, too, if that trains.

Shapes: N positions, D hidden, V vocabulary, K losses.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from layerpeel.losses.base import Loss, StepOutputs


class LogitLoss(Loss):
    """A loss on the logits of single positions."""

    reads_teacher: ClassVar[bool] = True

    reduction: Literal["token_mean", "sum/100"] = "token_mean"
    """`token_mean`: over all real tokens of the optimizer step. `sum/100`: the paper's, summed over a micro-batch and
    averaged over the micro-batches, so that its weight grows with the size of a micro-batch."""

    @abstractmethod
    def measure(self, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, summed over some positions, and its slope.

        Args:
            student, teacher: logits, [N, V] in fp32 (`teacher` is empty where no loss reads it).
            labels: [N], the next token of the text, or NO_LABEL.

        Returns:
            a scalar, and its gradient by the student's logits, [N, V].
        """

    def share(self, outputs: StepOutputs) -> float:
        """What the sum over a micro-batch is multiplied by."""
        if self.reduction == "token_mean":
            return 1 / max(self.step_count(outputs), 1)
        return 1 / (100 * outputs.micro_batches)

    def step_count(self, outputs: StepOutputs) -> int:
        """What the mean is over."""
        return outputs.step_tokens

    def __call__(self, outputs: StepOutputs) -> Tensor:
        return sweep([self], [1.0], outputs)[0]


class Divergence(LogitLoss):
    """A divergence between the two models' next-token distributions.

    Temperature as in Hinton et al. (arXiv 1503.02531), with the factor temperature squared.
    """

    temperature: PositiveFloat = 1.0
    """Divides both models' logits; the loss is multiplied by its square."""

    @abstractmethod
    def between(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The divergence of log-probabilities, [N, V], summed, and its slope by the student's logits; may overwrite."""

    def measure(self, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        t = self.temperature
        value, slope = self.between((student / t).log_softmax(-1), (teacher / t).log_softmax(-1))
        return value * t**2, slope.mul_(t)


def sweep(losses: Sequence[LogitLoss], weights: Sequence[float], outputs: StepOutputs) -> tuple[Tensor, Tensor]:
    """The weighted sum of losses over a micro-batch, and each part without its weight.

    Exact to the dense formulas, including what the model does to its logits (scale, soft-cap).

    Returns:
        a scalar in fp32, differentiable by the student's final hidden states and the parameters of its head; and [K].
    """
    head = outputs.student_head.model.get_output_embeddings()
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    mask = outputs.mask
    shares = [loss.share(outputs) for loss in losses]
    return _Sweep.apply(  # type: ignore[no-untyped-call, no-any-return]
        losses, weights, shares, outputs, outputs.labels[mask], outputs.teacher_final[mask],
        outputs.student_final[mask], *trained,
    )  # fmt: skip


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, losses: Sequence[LogitLoss], weights: Sequence[float], shares: Sequence[float],
        outputs: StepOutputs, labels: Tensor, teacher: Tensor, student: Tensor, *trained: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        wanted = any(ctx.needs_input_grad)
        gradients = [torch.zeros_like(t) for t in (student, *trained)] if wanted else []
        parts = torch.zeros(len(losses), dtype=torch.float32, device=student.device)
        rows = outputs.student_head.logit_rows(streams=2)
        for start in range(0, len(student), rows):
            chunk = slice(start, start + rows)
            with torch.set_grad_enabled(wanted):
                hidden = student[chunk].detach().requires_grad_(wanted)
                logits = outputs.student_head.logits(hidden)
            target = logits.new_zeros(0)
            if any(loss.reads_teacher for loss in losses):
                target = outputs.teacher_head.logits(teacher[chunk]).float()
            slope = None
            for number, loss in enumerate(losses):
                value, own = loss.measure(logits.detach().float(), target, labels[chunk])
                parts[number] += value * shares[number]
                own.mul_(weights[number] * shares[number])
                slope = own if slope is None else slope.add_(own)
            if wanted and slope is not None:
                of_hidden, *of_head = torch.autograd.grad(logits, [hidden, *trained], slope.to(logits.dtype))
                gradients[0][chunk] = of_hidden
                for gradient, part in zip(gradients[1:], of_head, strict=True):
                    gradient += part
        ctx.gradients = gradients
        ctx.mark_non_differentiable(parts)
        return (parts * torch.tensor(weights, device=parts.device)).sum(), parts

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        own = [gradient * grad_outputs[0].to(gradient.dtype) for gradient in ctx.gradients]
        return (None, None, None, None, None, None, *own)
