"""Tensors that are split between processes along one dimension: which part each has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Shard


def part_of(size: int, mesh: DeviceMesh) -> tuple[int, int]:
    """Where this process's part of a split dimension begins, and its length: as `torch.chunk` cuts it."""
    most = -(-size // mesh.size())
    start = min(most * mesh.get_local_rank(), size)
    return start, min(most, size - start)


def split_tensor(value: Tensor, mesh: DeviceMesh) -> DTensor:
    """A tensor split by its first dimension; this process keeps nothing else of it."""
    part = value.narrow(0, *part_of(len(value), mesh)).clone()
    return from_part(part, value.shape, mesh, [Shard(0)])


def from_part(local: Tensor, shape: torch.Size, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """The tensor of this shape of which a process has this part, or all, as its placement says."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)
