"""The optimizer that a config names: how it is made, tried out, and how large its state is.

An optimizer that takes only matrices (Muon, or any class with an attribute `matrices_only = True`) updates the matrices
of the layers; AdamW updates the rest: norms, biases, stacked experts, embeddings and the head.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_leaves

from layerpeel.config.distill import DistillConfig
from layerpeel.errors import InputError, reason_of, resolve_class

OPTIMIZERS: dict[str, type[Optimizer]] = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
}
FIELDS = {"params": "train", "lr": "learning_rate", "weight_decay": "weight_decay"}  # that set these arguments
# With torch's own default, Muon needs a far larger learning rate than AdamW; with this, the same (arXiv 2502.16982).
DEFAULTS: dict[str, dict[str, Any]] = {"Muon": {"adjust_lr_fn": "match_rms_adamw"}}
FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)  # made with one kernel for a whole step, if not asked
TRIAL_SIZE = 64  # rows and columns of the matrix that an optimizer is tried on


class ScheduledOptimizers:
    """One optimizer or several, each with its schedule, which make their steps together."""

    def __init__(self, optimizers: Sequence[Optimizer], schedules: Sequence[LRScheduler]) -> None:
        self.optimizers, self.schedules = optimizers, schedules

    @property
    def learning_rate(self) -> float:
        """That of the next step."""
        return float(self.schedules[0].get_last_lr()[0])

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        for schedule in self.schedules:
            schedule.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def optimizer_class(config: DistillConfig) -> type[Optimizer]:
    """The class that `distill.optimizer` names.

    Raises:
        InputError: there is none.
    """
    return resolve_class(config.optimizer, OPTIMIZERS, "optimizer", Optimizer)


def takes_only_matrices(kind: type[Optimizer]) -> bool:
    """Whether parameters that are not matrices have to be left to another optimizer."""
    return kind is OPTIMIZERS.get("Muon") or bool(getattr(kind, "matrices_only", False))


def make_optimizers(
    config: DistillConfig, parameters: Sequence[nn.Parameter], in_layer: Sequence[bool], rate: float
) -> list[Optimizer]:
    """The optimizers of these parameters: one, or two where the configured one takes only matrices.

    Args:
        in_layer: whether each parameter is of a layer.
        rate: the peak learning rate.

    Raises:
        InputError: there is no such class, or it does not take its options.
    """
    kind = optimizer_class(config)
    if not takes_only_matrices(kind):
        return [_make(config, kind, config.optimizer_options, parameters, rate)]
    is_matrix = [inside and parameter.ndim == 2 for parameter, inside in zip(parameters, in_layer, strict=True)]
    matrices = [parameter for parameter, matrix in zip(parameters, is_matrix, strict=True) if matrix]
    others = [parameter for parameter, matrix in zip(parameters, is_matrix, strict=True) if not matrix]
    options = DEFAULTS.get(config.optimizer, {}) | config.optimizer_options
    first = [_make(config, kind, options, matrices, rate)] if matrices else []
    return first + ([_make(config, torch.optim.AdamW, {}, others, rate)] if others else [])


def _make(
    config: DistillConfig,
    kind: type[Optimizer],
    options: Mapping[str, Any],
    parameters: Sequence[nn.Parameter],
    rate: float,
) -> Optimizer:
    """An optimizer; what FSDP2 splits (DTensors) is a group of its own, as kernels do not take both kinds at once."""
    for name in FIELDS.keys() & options.keys():
        raise InputError(f"distill.optimizer_options.{name}: it has a field", hint=f"set distill.{FIELDS[name]}")
    split = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
    groups = [split, [parameter for parameter in parameters if not isinstance(parameter, DTensor)]]
    accepted = inspect.signature(kind).parameters
    if kind in FUSED and not options.keys() & {"fused", "foreach", "differentiable"}:
        options = {**options, "fused": True}
    decay = {"weight_decay": config.weight_decay} if "weight_decay" in accepted else {}
    constructor: Any = kind
    try:
        optimizer: Optimizer = constructor(
            [{"params": group, "initial_lr": rate} for group in groups if group], lr=rate, **decay, **options
        )
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"distill.optimizer: {config.optimizer} does not take its options ({reason_of(error)})",
            hint=f"its arguments: {', '.join(accepted)}",
        ) from None
    return optimizer


def try_optimizer(config: DistillConfig, ndim: int = 2, device: torch.device | str = "cpu") -> Optimizer:
    """The optimizer of a layer's parameter of `ndim` dimensions, after one step on a small one.

    Raises:
        InputError: there is no such class, it does not take its options, or cannot make a step from dense gradients.
    """
    parameter = nn.Parameter(torch.ones((TRIAL_SIZE,) * ndim, device=device))
    parameter.grad = torch.ones_like(parameter)
    (optimizer,) = make_optimizers(config, [parameter], [True], config.learning_rate)
    try:
        optimizer.step()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"distill.optimizer: {config.optimizer} cannot be used here ({reason_of(error)})",
            hint="it has to make a step from dense gradients, without a closure",
        ) from None
    return optimizer


def state_bytes(config: DistillConfig, ndim: int = 2) -> float:
    """Bytes of optimizer state for each number of a layer's parameter of `ndim` dimensions, measured on a small one."""
    leaves = tree_leaves([*try_optimizer(config, ndim).state.values()])
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.numel() > 1]  # not counters
    return sum(tensor.nbytes for tensor in tensors) / float(TRIAL_SIZE**ndim)


def total_state_bytes(config: DistillConfig, parameters: Sequence[Tensor], in_layer: Sequence[bool]) -> int:
    """Bytes of optimizer state for these parameters, which may be on the meta device."""
    only_matrices = takes_only_matrices(optimizer_class(config))
    matrix, other = state_bytes(config), state_bytes(config, ndim=1)
    total = 0.0
    for parameter, inside in zip(parameters, in_layer, strict=True):
        as_matrix = (inside and parameter.ndim == 2) if only_matrices else parameter.ndim >= 2
        total += (matrix if as_matrix else other) * parameter.numel()
    return round(total)
