"""Gradients of several processes that train one student: their sums, and their norm.

Of what each process has whole, gradients are summed after the last micro-batch of a step; those of what is split (see
`training/sharded.py`) are summed as its backward pass runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor

from layerpeel.processes.distributed import sum_numbers

BUCKET = 2**26  # elements that are summed over processes at a time


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Adds up, over all processes, the gradients of the parameters that are replicated."""
    if not distributed.is_initialized():
        return
    bucket: list[Tensor] = []
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            continue
        if parameter.grad is None:  # a process whose share of the step never touched it
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(gradient.numel() for gradient in bucket) >= BUCKET:
            _sum_bucket(bucket)
            bucket = []
    if bucket:
        _sum_bucket(bucket)


def _sum_bucket(bucket: list[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in bucket])
    distributed.all_reduce(flat)
    for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
        gradient.copy_(part.view_as(gradient))


def gradient_norm(parameters: Iterable[nn.Parameter], device: torch.device) -> float:
    """The norm of all gradients together, the same number in every process."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    split = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    others = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    squares = [float(nn.utils.get_total_norm(part)) ** 2 if part else 0.0 for part in (split, others)]
    return math.sqrt(sum_numbers({"split": squares[0]}, device)["split"] + squares[1])
