"""Losses on the logits, computed from final hidden states without vocabulary-sized logits for a whole batch.

Positions go through the head in chunks. Value and gradient of all such losses are computed for each chunk before the
next, so that nothing of size V outlives its chunk. If the head trains, its gradient is computed, too.

Shapes: N positions of a chunk, D hidden, V vocabulary, K losses.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from layerpeel.losses.base import Loss, StepOutputs
from layerpeel.losses.head import Heads

PAPER_TOKENS = 2 * 2048  # of a micro-batch, over which the authors' script sums (arXiv 2511.05085)
BYTES_IN_CACHE = 4 * 2**20  # of one of the tensors that a loss makes of some rows of logits


class LogitLoss(Loss):
    """A loss on the logits of single positions.

    `value` is its formula, and all that a subclass has to define: autograd differentiates it in each chunk. A subclass
    may override `value_and_grad` with a gradient derived by hand, which takes less memory and time.
    """

    reads_teacher: ClassVar[bool] = True

    reduction: Literal["token_mean", "sum/100"] = "token_mean"
    """`token_mean`: over all real tokens of the optimizer step. `sum/100`: the paper's, summed over 4,096 tokens (its
    micro-batch, two rows of 2,048) and divided by 100: 40.96 times the mean over tokens, however a step is cut."""

    @abstractmethod
    def value(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        """The loss at each position.

        Args:
            student_logits, teacher_logits: [N, V] in fp32, not to be changed; `teacher_logits` is empty where
                `reads_teacher` is False for all losses.
            labels: [N], the next token of the text; NO_LABEL where there is none.

        Returns:
            [N], or their sum.
        """

    def value_and_grad(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss summed over positions, and its gradient with respect to `student_logits`: a scalar and [N, V]."""
        return differentiate(lambda logits: self.value(logits, teacher_logits, labels), student_logits)

    def scale(self, outputs: StepOutputs) -> float:
        """The factor that makes the sum over a micro-batch its share of the step's loss."""
        if self.reduction == "token_mean":
            return 1 / max(self.step_count(outputs), 1)
        return PAPER_TOKENS / (100 * max(outputs.step_tokens, 1))

    def step_count(self, outputs: StepOutputs) -> int:
        """The number of positions that `token_mean` averages over."""
        return outputs.step_tokens

    def __call__(self, outputs: StepOutputs) -> Tensor:
        return sweep([self], [1.0], outputs)[0]


class Divergence(LogitLoss):
    """A divergence between the next-token distributions of student and teacher.

    Temperature as in Hinton et al. (arXiv 1503.02531), with the factor temperature squared.
    """

    temperature: PositiveFloat = 1.0
    """Divides both models' logits; the loss is multiplied by its square."""

    @abstractmethod
    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The divergence at each position: [N, V] log-probabilities, not to be changed -> [N], or their sum."""

    def between_and_grad(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of `between`, and its gradient with respect to the logits that `student` is the log-softmax of.

        May overwrite its arguments.
        """
        value, grad = differentiate(lambda log_probs: self.between(log_probs, teacher), student)
        return value, grad - student.exp() * grad.sum(-1, keepdim=True)

    def value(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        return self.between(*self._log_probs(student_logits, teacher_logits)) * self.temperature**2

    def value_and_grad(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        value, grad_logits = self.between_and_grad(*self._log_probs(student_logits, teacher_logits))
        return value * self.temperature**2, grad_logits.mul_(self.temperature)

    def _log_probs(self, *logits: Tensor) -> tuple[Tensor, ...]:
        t = self.temperature
        return tuple((each if t == 1 else each / t).log_softmax(-1) for each in logits)


def differentiate(formula: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of `formula(inputs)`, and its gradient with respect to `inputs`, by autograd; zeros if it has none."""
    with torch.enable_grad():
        leaf = inputs.detach().requires_grad_()
        value = formula(leaf).sum()
    if not value.requires_grad:
        return value, torch.zeros_like(inputs)
    (grad,) = torch.autograd.grad(value, leaf, materialize_grads=True)
    return value.detach(), grad.contiguous()  # that of a plain sum is a single number, expanded


def sweep(losses: Sequence[LogitLoss], weights: Sequence[float], outputs: StepOutputs) -> tuple[Tensor, Tensor]:
    """The weighted sum of losses over a micro-batch, and each loss without its weight.

    Equal to the dense formulas, including what the model does to its logits (scale, soft-cap).

    Returns:
        a scalar in fp32, differentiable by the student's final hidden states and the parameters of its head; and [K].
    """
    head = outputs.student_head.head_module
    trained = {name: parameter for name, parameter in head.named_parameters() if parameter.requires_grad}
    token_index = outputs.token_index
    return _Sweep.apply(  # type: ignore[no-untyped-call, no-any-return]
        losses,
        weights,
        outputs,
        outputs.labels[token_index],
        outputs.teacher_final[token_index],
        list(trained),
        outputs.student_final[token_index],
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
        scales, weighted = torch.tensor([loss.scale(outputs) for loss in losses]), torch.tensor(weights)
        factors = (scales * weighted).tolist()
        scales, weighted = scales.to(student.device), weighted.to(student.device)
        values = torch.zeros(len(losses), dtype=torch.float32, device=student.device)
        grad_hidden = torch.zeros_like(student) if any(ctx.needs_input_grad) else None
        rows = min(outputs.student_head.logit_rows(branches=2), max(len(student), 1))
        heads = Heads(outputs.student_head, outputs.teacher_head, rows)
        reads_teacher = any(loss.reads_teacher for loss in losses)
        for start in range(0, len(student), rows):
            chunk = slice(start, start + rows)
            logits = heads.logits(student[chunk], teacher[chunk] if reads_teacher else None)
            for piece in _pieces(logits.student):
                target = logits.student[:0] if logits.teacher is None else logits.teacher[piece]
                measured = [loss.value_and_grad(logits.student[piece], target, labels[chunk][piece]) for loss in losses]
                values += torch.stack([value for value, _ in measured]) * scales
                logits.student[piece] = sum(  # the gradient takes the place of the logits
                    grad.mul_(factor) for (_, grad), factor in zip(measured, factors, strict=True)
                )
            if grad_hidden is not None:
                grad_hidden[chunk] = logits.backward(logits.student)
        ctx.gradients = [grad_hidden, *(heads.gradients[name] for name in trained)]
        ctx.mark_non_differentiable(values)
        return (values * weighted).sum(), values

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [gradient * grad_outputs[0].to(gradient.dtype) for gradient in ctx.gradients]
        return (None, None, None, None, None, None, *gradients)


def _pieces(logits: Tensor) -> Iterator[slice]:
    """All rows at once; on a CPU a few rows at a time, so that what is computed from them stays in its caches."""
    rows, vocabulary = logits.shape
    step = max(1, BYTES_IN_CACHE // (4 * vocabulary)) if logits.device.type == "cpu" else max(rows, 1)
    yield from (slice(start, start + step) for start in range(0, rows, step))
