"""How fast processes of this machine exchange tensors through gloo, measured between threads that stand for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from statistics import median
from threading import Barrier
from typing import Any

import torch
from torch import Tensor, distributed

SIZE = 4 * 2**20  # numbers in fp32 that are exchanged for a time
REPEATS = 5
PATIENCE = timedelta(seconds=60)

Exchange = Callable[[Any, Tensor], None]  # of a gloo group: its collectives are not in torch's stubs


def exchange_times(processes: int) -> tuple[float, float]:
    """Seconds for each byte that is summed over so many processes, and for each that is gathered from them."""

    def add_up(group: Any, tensor: Tensor) -> None:
        group.allreduce([tensor]).wait()

    def gather(group: Any, tensor: Tensor) -> None:
        group._allgather_base(tensor, torch.zeros(len(tensor) // processes)).wait()

    size = SIZE // processes * processes
    return _seconds(processes, size, add_up) / (4 * size), _seconds(processes, size, gather) / (4 * size)


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
