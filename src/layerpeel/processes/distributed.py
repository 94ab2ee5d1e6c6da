"""Which process this is, of those that a launcher started, and sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from accelerate import PartialState
from torch import distributed


def processes_of(device: torch.device) -> PartialState:
    """The processes that a launcher started, as Accelerate sees them; the first call joins them."""
    return PartialState(cpu=device.type == "cpu")


def is_main_process() -> bool:
    """Whether this is the first of them, the one that writes what all have in common."""
    return RANK == 0


def sum_numbers(numbers: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Adds up numbers over all processes."""
    if not distributed.is_initialized():
        return dict(numbers)
    values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    distributed.all_reduce(values)
    return dict(zip(numbers, values.tolist(), strict=True))


_rank = os.environ.get("RANK", "0")
RANK = int(_rank) if _rank.isdecimal() else 0  # of this process among those that a launcher started
