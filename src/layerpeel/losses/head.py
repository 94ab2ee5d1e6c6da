"""The heads of student and teacher over one chunk of positions after another, in memory that is used again.

The logits of a real vocabulary are the largest tensors of a training step, and on a CPU asking for such memory anew
takes as long as the arithmetic on it. So the product with the head's weights is done here, into buffers; what the
model does to its logits after it (scale, soft-cap) is done by the model's own forward.

Shapes: N positions of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from layerpeel.errors import InputError
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.layer_inputs import replaced_forward


class Heads:
    """Logits of both models for a chunk, and the way back through the student's head.

    Args:
        student, teacher: whose heads.
        positions: the most that a chunk has.

    Attributes:
        gradients: of the student's head, by what of it trains: `weight`, `bias`; they add up over chunks.
    """

    def __init__(self, student: LayerwiseModel, teacher: LayerwiseModel, positions: int) -> None:
        self.stacks = (student, teacher)
        self.linears = tuple(_linear(layerwise) for layerwise in self.stacks)
        self.shared = self.linears[0].weight is self.linears[1].weight
        device = student.device.type
        autocast = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device) if autocast else self.linears[0].weight.dtype
        self.weights = tuple(linear.weight.detach().to(self.dtype) for linear in self.linears)
        self.buffers = [
            torch.empty(
                2 * positions if self.shared else positions, student.vocab_size, dtype=self.dtype, device=student.device
            )
            for _ in range(1 if self.shared else 2)
        ]
        self.gradients = {n: torch.zeros_like(p) for n, p in self.linears[0].named_parameters() if p.requires_grad}

    def logits(self, student: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Final hidden states, [N, D], to logits, [N, V] in fp32, which hold until the next chunk and may be changed.

        Args:
            teacher: None where no loss reads the teacher.
        """
        self._hidden = student.to(self.dtype)
        raw = self._products(self._hidden, None if teacher is None else teacher.to(self.dtype))
        self._raw = raw[0].requires_grad_()
        with torch.enable_grad():
            self._finished = _finished(self.stacks[0], self._raw)
        own = self._finished.detach()
        if own.data_ptr() != self._raw.data_ptr():
            own = own.clone() if own.dtype is torch.float32 else own
        return own.float(), None if teacher is None else _finished(self.stacks[1], raw[1]).float()

    def backward(self, grad_logits: Tensor) -> Tensor:
        """The gradient of the student's hidden states, [N, D], from that of its logits; adds to `gradients`."""
        grad_logits = grad_logits.to(self._finished.dtype)
        if self._finished.data_ptr() != self._raw.data_ptr():
            (grad_logits,) = torch.autograd.grad(self._finished, self._raw, grad_logits)
        if "weight" in self.gradients:
            self.gradients["weight"] += grad_logits.T @ self._hidden
        if "bias" in self.gradients:
            self.gradients["bias"] += grad_logits.sum(0)
        return grad_logits @ self.weights[0]

    def _products(self, student: Tensor, teacher: Tensor | None) -> list[Tensor]:
        count = len(student)
        if teacher is not None and self.shared:
            both = torch.cat([student, teacher])
            found = list(torch.mm(both, self.weights[0].T, out=self.buffers[0][: 2 * count]).split(count))
        else:
            inputs = [student] if teacher is None else [student, teacher]
            found = [
                torch.mm(hidden, weight.T, out=buffer[:count])
                for hidden, weight, buffer in zip(inputs, self.weights, [*self.buffers], strict=False)
            ]
        for raw, linear in zip(found, self.linears, strict=False):
            if linear.bias is not None:
                raw += linear.bias.detach()
        return [raw.detach() for raw in found]


def _linear(layerwise: LayerwiseModel) -> nn.Linear:
    head = layerwise.head_module
    if not isinstance(head, nn.Linear):
        raise InputError(
            f"the head of a {layerwise.model.config.model_type} model is a {type(head).__name__}, not a linear layer",
            hint="losses on the logits cannot be computed for it; use hidden_mse or hidden_cosine",
        )
    return head


def _finished(layerwise: LayerwiseModel, raw: Tensor) -> Tensor:
    """What the model's own forward makes of what its head gives, [N, V] -> [N, V]."""
    with replaced_forward(layerwise.head_module, lambda *_: raw[None]):
        return layerwise.logits(raw.new_zeros(len(raw), _linear(layerwise).in_features))
