"""Forward KL, KL(teacher || student), from the final hidden states, without vocabulary-sized logits for a batch.

Kovalev and Tikhomirov (arXiv 2511.05085) sum it over positions and vocabulary and divide by 100; Minitron
(arXiv 2407.14679) and this package's default take the mean over tokens. Temperature as in Hinton et al.
(arXiv 1503.02531), with the factor temperature squared.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor
from torch.nn import functional

from layerpeel.losses.base import Loss, StepOutputs
from layerpeel.stack import Stack


class KL(Loss):
    """KL(teacher || student) on the logits, over real tokens."""

    reduction: Literal["token_mean", "sum/100"] = "token_mean"
    """`token_mean`: over all real tokens of the optimizer step. `sum/100`: the paper's, summed over a micro-batch and
    averaged over the micro-batches, so that its weight grows with the size of a micro-batch."""
    temperature: PositiveFloat = 1.0
    """Divides both models' logits; the loss is multiplied by its square."""

    def __call__(self, outputs: StepOutputs) -> Tensor:
        total = chunked_kl(
            outputs.student_final[outputs.mask],
            outputs.teacher_final[outputs.mask],
            outputs.head,
            self.temperature,
        )
        if self.reduction == "token_mean":
            return total / max(outputs.step_tokens, 1)
        return total / (100 * outputs.micro_batches)


def chunked_kl(student: Tensor, teacher: Tensor, head: Stack, temperature: float = 1.0) -> Tensor:
    """The sum over positions of KL(teacher || student), exact, with logits for one chunk of positions at a time.

    Value and gradient are found in the same sweep; nothing of vocabulary size outlives its chunk.

    Args:
        student, teacher: [N, D], final hidden states.
        head: whose head maps them to logits, [N, V], with its own scaling and soft-capping.

    Returns:
        a scalar in fp32, differentiable with respect to `student`.
    """
    return _ChunkedKL.apply(student, teacher, head, temperature)  # type: ignore[no-untyped-call]


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, head: Stack, temperature: float) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        rows = head.logit_rows(streams=2)
        for start in range(0, len(student), rows):
            chunk = slice(start, start + rows)
            target = (head.logits(teacher[chunk]).float() / temperature).log_softmax(-1)
            with torch.set_grad_enabled(gradient is not None):
                hidden = student[chunk].detach().requires_grad_(gradient is not None)
                logits = head.logits(hidden)
            own = (logits.detach().float() / temperature).log_softmax(-1)
            total += functional.kl_div(own, target, log_target=True, reduction="sum") * temperature**2
            if gradient is not None:
                slope = (own.exp_() - target.exp_()) * temperature  # of the scaled KL by the logits
                (gradient[chunk],) = torch.autograd.grad(logits, hidden, slope.to(logits.dtype))
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        return ctx.gradient * grad_outputs[0].to(ctx.gradient.dtype), None, None, None
