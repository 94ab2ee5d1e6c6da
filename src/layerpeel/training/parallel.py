"""Several processes that train one student: sums of gradients, and parameters sharded between them.

Every process holds the frozen weights. What trains is replicated too, and its gradients are summed after the last
micro-batch of a step; or, under FSDP2, each layer's trained parameters, gradients and optimizer state are split.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from layerpeel.processes.distributed import sum_numbers
from layerpeel.training.student import Student

BUCKET = 2**26  # elements that are summed over processes at a time


@contextmanager
def sharded(student: Student, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """For the time of the context, splits what trains over the processes, under `accelerate launch --use_fsdp`.

    The layers that train are replaced by stand-ins whose trained parameters are split (FSDP2) and whose frozen ones are
    the same tensors as before. Afterwards the layers are back, with all of the trained weights.

    Args:
        weights: the trained parameters by name, as they were before. After an exception the layers hold these: other
            processes may be elsewhere, and would not answer if they were asked for their parts.
    """
    if not distributed.is_initialized() or not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        yield
        return
    mesh = init_device_mesh(student.model.device.type, (distributed.get_world_size(),))
    layers = list(student.layerwise.layers)
    split = {position: _split(layer, mesh) for position, layer in enumerate(layers) if _trains(layer)}
    student.layerwise.architecture.set_layers([split.get(position, layer) for position, layer in enumerate(layers)])
    try:
        yield
    except BaseException:
        student.layerwise.architecture.set_layers(layers)
        for name, parameter in student.parameters().items():
            if parameter.requires_grad and not parameter.numel():
                parameter.data = weights[name].to(parameter)
        raise
    student.layerwise.architecture.set_layers(layers)
    for position, stand_in in split.items():
        _take_back(layers[position], stand_in)


def _split(layer: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """A copy of the layer with its trained parameters split; the layer itself is left without them."""
    frozen = {p for p in layer.parameters() if not p.requires_grad}
    stand_in = copy.deepcopy(layer, memo={id(t): t for t in (*frozen, *layer.buffers())})
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.new_empty(0)
    # Said, or FSDP2 would keep all layers whole after the forward pass: each is called by itself, as a root.
    split = fully_shard(stand_in, mesh=mesh, reshard_after_forward=True, ignored_params=frozen)
    split.set_gradient_divide_factor(1.0)  # gradients add up: losses are shares of the step's
    split.set_force_sum_reduction_for_comms(True)
    return stand_in


@torch.no_grad()
def _take_back(layer: nn.Module, stand_in: nn.Module) -> None:
    for parameter, trained in zip(layer.parameters(), stand_in.parameters(), strict=True):
        if isinstance(trained, DTensor):
            parameter.data = trained.full_tensor()


def _trains(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())


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
