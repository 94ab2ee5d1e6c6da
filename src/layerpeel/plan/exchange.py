"""How fast processes of this machine exchange tensors through gloo, measured between threads that stand for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import timedelta
from statistics import median
from threading import Barrier
from typing import Any

import torch
from torch import Tensor, distributed

from layerpeel.processes.malloc import large_blocks_given_back

SIZE = 4 * 2**20  # numbers in fp32 that are exchanged for a time
REPEATS = 5
PATIENCE = timedelta(seconds=60)

Exchange = Callable[[Any, Tensor], None]  # of a gloo group: its collectives are not in torch's stubs


def exchange_times(processes: int, *, split: bool) -> tuple[float, float]:
    """Seconds for each byte of what trains that is summed over so many processes, and for each byte that is gathered.

    With them the copies into and out of the buffers that are exchanged, which take a good part of the time on CPUs.

    Args:
        split: whether each process gets its part of a sum alone, as where layers are split.
    """

    def add_up(group: Any, tensor: Tensor) -> None:
        buffer = torch.cat([tensor])
        group.allreduce([buffer]).wait()
        tensor.copy_(buffer)

    def add_up_a_part(group: Any, tensor: Tensor) -> None:
        part = torch.empty(len(tensor) // processes)
        group._reduce_scatter_base(part, torch.cat([tensor])).wait()
        tensor[: len(part)].copy_(part)

    def gather(group: Any, tensor: Tensor) -> None:
        part, buffer = tensor[: len(tensor) // processes].clone(), torch.empty(len(tensor))
        group._allgather_base(buffer, part).wait()
        tensor.copy_(buffer)

    size, add = SIZE // processes * processes, add_up_a_part if split else add_up
    with large_blocks_given_back() if split else nullcontext():  # as in such a training
        return _seconds(processes, size, add) / (4 * size), _seconds(processes, size, gather) / (4 * size)


def _seconds(processes: int, size: int, exchange: Exchange) -> float:
    """The median time of an exchange of so many numbers, after a first one."""
    store, meeting = distributed.HashStore(), Barrier(processes)

    def times(rank: int) -> list[float]:
        group = distributed.ProcessGroupGloo(store, rank, processes, PATIENCE)
        tensor, spent = torch.zeros(size), []
        for _ in range(REPEATS + 1):
            meeting.wait()
            started = time.perf_counter()
            exchange(group, tensor)
            spent.append(time.perf_counter() - started)
        return spent

    with ThreadPoolExecutor(processes) as pool:
        first, *_ = pool.map(times, range(processes))
    return median(first[1:])
