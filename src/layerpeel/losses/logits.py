"""Losses on the logits, from the final hidden states, without vocabulary-sized logits for a batch.

Positions go through the head in chunks, and value and gradient are found in the same sweep, for all such losses at
once; nothing of vocabulary size outlives its chunk. The gradient goes to the head, too, if that trains.

Shapes: N positions, D hidden, V vocabulary, K losses.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from layerpeel.losses.base import Loss, StepOutputs
from layerpeel.losses.head import Heads

BYTES_IN_CACHE = 4 * 2**20  # of one of the tensors that a loss makes of some rows of logits


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
        if t != 1:
            student, teacher = student / t, teacher / t
        value, grad_logits = self.between(student.log_softmax(-1), teacher.log_softmax(-1))
        return value * t**2, grad_logits.mul_(t)


def sweep(losses: Sequence[LogitLoss], weights: Sequence[float], outputs: StepOutputs) -> tuple[Tensor, Tensor]:
    """The weighted sum of losses over a micro-batch, and each part without its weight.

    Exact to the dense formulas, including what the model does to its logits (scale, soft-cap).

    Returns:
        a scalar in fp32, differentiable by the student's final hidden states and the parameters of its head; and [K].
    """
    head = outputs.student_head.head_module
    trained = {name: parameter for name, parameter in head.named_parameters() if parameter.requires_grad}
    mask = outputs.mask
    return _Sweep.apply(  # type: ignore[no-untyped-call, no-any-return]
        losses,
        weights,
        outputs,
        outputs.labels[mask],
        outputs.teacher_final[mask],
        list(trained),
        outputs.student_final[mask],
        *trained.values(),
    )


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        losses: Sequence[LogitLoss],
        weights: Sequence[float],
        outputs: StepOutputs,
        labels: Tensor,
        teacher: Tensor,
        trained: list[str],
        student: Tensor,
        *_: Tensor,
    ) -> tuple[Tensor, Tensor]:
        shares = torch.tensor([loss.share(outputs) for loss in losses], device=student.device)
        weighted = torch.tensor(weights, device=student.device)
        factors = (shares * weighted).tolist()
        parts = torch.zeros(len(losses), dtype=torch.float32, device=student.device)
        gradient = torch.zeros_like(student) if any(ctx.needs_input_grad) else None
        rows = min(outputs.student_head.logit_rows(branches=2), max(len(student), 1))
        heads = Heads(outputs.student_head, outputs.teacher_head, rows)
        reads_teacher = any(loss.reads_teacher for loss in losses)
        for start in range(0, len(student), rows):
            chunk = slice(start, start + rows)
            own, target = heads.logits(student[chunk], teacher[chunk] if reads_teacher else None)
            for few in _few_rows(own):
                read = own[:0] if target is None else target[few]
                measured = [loss.measure(own[few], read, labels[chunk][few]) for loss in losses]
                parts += torch.stack([value for value, _ in measured]) * shares
                own[few] = sum(
                    grad_logits.mul_(factor) for (_, grad_logits), factor in zip(measured, factors, strict=True)
                )
            if gradient is not None:
                gradient[chunk] = heads.backward(own)
        ctx.gradients = [gradient, *(heads.gradients[name] for name in trained)]
        ctx.mark_non_differentiable(parts)
        return (parts * weighted).sum(), parts

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        own = [gradient * grad_outputs[0].to(gradient.dtype) for gradient in ctx.gradients]
        return (None, None, None, None, None, None, *own)


def _few_rows(logits: Tensor) -> Iterator[slice]:
    """All rows at once; on a CPU a few at a time, so that what is derived from them stays in its caches."""
    rows, vocabulary = logits.shape
    few = max(1, BYTES_IN_CACHE // (4 * vocabulary)) if logits.device.type == "cpu" else rows
    yield from (slice(start, start + few) for start in range(0, rows, max(few, 1)))
