"""The heads of student and teacher, run on one chunk of positions after another in buffers that are reused.

The logits of a real vocabulary are the largest tensors of a training step, and on a CPU allocating such memory takes as
long as the arithmetic on it. So the product with the head's weights is computed here, into buffers; what the model does
to its logits afterwards (scale, soft-cap) is done by the model's own forward.

Shapes: N positions of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerpeel.errors import InputError
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.layer_inputs import replaced_forward


class Heads:
    """Computes both models' logits of a chunk, and the gradients of the student's head.

    Args:
        student, teacher: the models whose heads to run.
        positions: the largest N of any chunk.

    Attributes:
        gradients: of the parameters of the student's head that train (`weight`, `bias`), summed over chunks.
    """

    def __init__(self, student: LayerwiseModel, teacher: LayerwiseModel, positions: int) -> None:
        self.models = (student, teacher)
        self.linears = tuple(_linear(layerwise) for layerwise in self.models)
        self.shared = self.linears[0].weight is self.linears[1].weight
        device = student.device.type
        autocast = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device) if autocast else self.linears[0].weight.dtype
        self.weights = tuple(linear.weight.detach().to(self.dtype) for linear in self.linears)
        rows = 2 * positions if self.shared else positions
        self.buffers = [
            torch.empty(rows, student.vocab_size, dtype=self.dtype, device=student.device)
            for _ in range(1 if self.shared else 2)
        ]
        self.gradients = {n: torch.zeros_like(p) for n, p in self.linears[0].named_parameters() if p.requires_grad}

    def logits(self, student: Tensor, teacher: Tensor | None) -> ChunkLogits:
        """Final hidden states [N, D] to logits, which are valid until the next call.

        Args:
            teacher: None where no loss reads the teacher's logits.
        """
        hidden = student.to(self.dtype)
        products = self._products(hidden, None if teacher is None else teacher.to(self.dtype))
        product = products[0].requires_grad_()
        with torch.enable_grad():
            processed = _postprocessed(self.models[0], product)
        logits = processed.detach()
        if logits.data_ptr() != product.data_ptr():
            logits = logits.clone() if logits.dtype is torch.float32 else logits
        teacher_logits = None if teacher is None else _postprocessed(self.models[1], products[1]).float()
        return ChunkLogits(logits.float(), teacher_logits, self, hidden, product, processed)

    def _products(self, student: Tensor, teacher: Tensor | None) -> list[Tensor]:
        """Hidden states times the heads' weights, plus their biases, in the buffers: [N, V] of each model."""
        count = len(student)
        if teacher is not None and self.shared:
            both = torch.cat([student, teacher])
            products = list(torch.mm(both, self.weights[0].T, out=self.buffers[0][: 2 * count]).split(count))
        else:
            inputs = [student] if teacher is None else [student, teacher]
            products = [
                torch.mm(hidden, weight.T, out=buffer[:count])
                for hidden, weight, buffer in zip(inputs, self.weights, [*self.buffers], strict=False)
            ]
        for product, linear in zip(products, self.linears, strict=False):
            if linear.bias is not None:
                product += linear.bias.detach()
        return [product.detach() for product in products]


@dataclass(frozen=True)
class ChunkLogits:
    """The logits of a chunk, and what their backward pass needs.

    Attributes:
        student: [N, V] in fp32, which may be overwritten.
        teacher: the same of the teacher; None if it was not asked for.
        heads: where the gradients of the student's head are summed.
        hidden: [N, D], the student's final hidden states.
        product: [N, V], what the student's head gives.
        processed: [N, V], what the student's own forward makes of it (scale, soft-cap), with its graph.
    """

    student: Tensor
    teacher: Tensor | None
    heads: Heads
    hidden: Tensor
    product: Tensor
    processed: Tensor

    def backward(self, grad_logits: Tensor) -> Tensor:
        """The gradient of the student's hidden states, [N, D], from that of its logits; adds to `heads.gradients`."""
        grad = grad_logits.to(self.processed.dtype)
        if self.processed.data_ptr() != self.product.data_ptr():
            (grad,) = torch.autograd.grad(self.processed, self.product, grad)
        if "weight" in self.heads.gradients:
            self.heads.gradients["weight"] += grad.T @ self.hidden
        if "bias" in self.heads.gradients:
            self.heads.gradients["bias"] += grad.sum(0)
        return grad @ self.heads.weights[0]


def _linear(layerwise: LayerwiseModel) -> nn.Linear:
    head = layerwise.head_module
    if not isinstance(head, nn.Linear):
        raise InputError(
            f"the head of a {layerwise.model.config.model_type} model is a {type(head).__name__}, not a linear layer",
            hint="losses on the logits cannot be computed for it; use losses on hidden states alone",
        )
    return head


def _postprocessed(layerwise: LayerwiseModel, product: Tensor) -> Tensor:
    """What the model's own forward does to its head's output (scale, soft-cap): [N, V] -> [N, V]."""
    with replaced_forward(layerwise.head_module, lambda *_: product[None]):
        return layerwise.logits(product.new_zeros(len(product), _linear(layerwise).in_features))
