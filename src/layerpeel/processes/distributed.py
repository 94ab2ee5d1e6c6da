"""Which process this is: rank and world size as the launcher set them, and collectives over all processes.

The only module that reads the launcher's environment variables (`torchrun` and `accelerate launch` set them) and that
makes Accelerate's `PartialState`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

from layerpeel.errors import InputError

if TYPE_CHECKING:  # seconds to import, which messages and answers of the command line need not wait for
    import torch
    from accelerate import PartialState

LAUNCHER_VARIABLES = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # with their values without a launcher

# How long processes wait for one another: one may load, save or evaluate while the others have nothing to do.
PATIENCE = timedelta(hours=3)

T = TypeVar("T")


def _launcher_number(name: str) -> int:
    """The variable's value; its default for a malformed one, which `check_launcher` reports."""
    value = os.environ.get(name, "")
    return int(value if value.isdecimal() else LAUNCHER_VARIABLES[name])


RANK = _launcher_number("RANK")
"""Index of this process among all launched ones; 0 without a launcher."""
LOCAL_RANK = _launcher_number("LOCAL_RANK")
"""Index of this process on its machine, and so of its GPU."""
WORLD_SIZE = _launcher_number("WORLD_SIZE")
"""How many processes were launched; 1 without a launcher."""


def is_main_process() -> bool:
    """Whether this process is the one that writes files and prints results (rank 0)."""
    return RANK == 0


def processes_of(device: torch.device) -> PartialState:
    """Accelerate's view of the launched processes, which has `process_index` and `num_processes`.

    The first call initializes `torch.distributed`, with a backend that works on `device`.
    """
    from accelerate import PartialState

    # Else transformers before 5.23 would leave the weights of all but the first process of a machine empty, for FSDP to
    # fill; here each process loads its own. `accelerate launch --use_fsdp` sets it.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return PartialState(cpu=device.type == "cpu", timeout=PATIENCE)


def gather(value: T) -> list[T]:
    """The picklable value of each process, in the order of their ranks; every process has to call it."""
    from accelerate.utils import gather_object
    from torch import distributed

    return gather_object([value]) if distributed.is_initialized() else [value]


def from_main(work: Callable[[], T]) -> T:
    """What `work` gives in the main process, the only one that runs it; every process has to call it.

    Raises:
        Exception, KeyboardInterrupt: in all of them, if `work` raised it.
    """
    from torch import distributed

    if not distributed.is_initialized():
        return work()
    value, error = None, None
    if is_main_process():
        try:
            value = work()
        except (Exception, KeyboardInterrupt) as raised:
            error = raised
    value, error = gather((value, error))[0]
    if error:
        raise error
    return cast(T, value)


def sum_numbers(numbers: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Sums numbers over all processes, in float64; every process has to call it with the same keys."""
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        return dict(numbers)
    values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    distributed.all_reduce(values)
    return dict(zip(numbers, values.tolist(), strict=True))


def sum_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Adds up tensors over all processes, in place; every process has to call it."""
    from torch import distributed

    if distributed.is_initialized():
        for tensor in tensors:
            distributed.all_reduce(tensor)


def wait_for_all() -> None:
    """Returns when all processes have called it."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.barrier()


def is_of_another_process(error: RuntimeError) -> bool:
    """Whether a collective failed because another process has ended, or did not come in time."""
    import torch

    return WORLD_SIZE > 1 and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower())


def check_launcher() -> None:
    """Checks the launcher's environment variables, before a library fails on them.

    Raises:
        InputError: one is not a number, the rank is not below the world size, or the address to meet at is missing.
    """
    numbers = {name: os.environ.get(name, default) for name, default in LAUNCHER_VARIABLES.items()}
    for name, value in numbers.items():
        if not re.fullmatch("[0-9]{1,9}", value):
            raise InputError(f"environment: {name} is '{value}', expected a number", hint=f"unset {name}")
    if int(numbers["RANK"]) >= int(numbers["WORLD_SIZE"]):
        raise InputError(
            f"environment: RANK is {numbers['RANK']} of WORLD_SIZE {numbers['WORLD_SIZE']} processes",
            hint="start several processes by torchrun or accelerate launch, or unset both",
        )
    if int(numbers["WORLD_SIZE"]) > 1 and "MASTER_ADDR" not in os.environ:
        raise InputError(
            f"environment: WORLD_SIZE is {numbers['WORLD_SIZE']}, and MASTER_ADDR is not set",
            hint="start several processes by torchrun or accelerate launch, or unset WORLD_SIZE",
        )
