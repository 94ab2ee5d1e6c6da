"""The device and dtype that a model runs in."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from layerpeel.errors import InputError, nearest
from layerpeel.processes.distributed import LOCAL_RANK, WORLD_SIZE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str = "auto") -> torch.device:
    """The device named, or for `auto` the first available of CUDA, MPS and CPU.

    A launcher starts one process for each GPU: `cuda` is then the GPU of this process.

    Raises:
        InputError: this machine has no such device, or none for this process.
    """
    if device == "auto":
        backends = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        device = next(name for name, available in backends.items() if available)
    try:
        target = torch.device(device)
    except RuntimeError:
        raise InputError(f"device: unknown device {device!r}", hint="use auto, cpu, cuda or cuda:N") from None
    device_counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (target.index or 0) >= device_counts.get(target.type, 0):
        raise InputError(f"device: there is no {device} here", hint="use auto, cpu, cuda or cuda:N")
    return _of_this_process(target, device_counts["cuda"]) if target.type == "cuda" else target


def _of_this_process(target: torch.device, visible: int) -> torch.device:
    """The GPU of this process, of so many that it sees: the only one (as SLURM may have it), or that of its number.

    Raises:
        InputError: there are fewer GPUs than processes, or all processes would share one.
    """
    if WORLD_SIZE > 1 and target.index is not None and visible > 1:
        raise InputError(
            f"device: {target} would be that of all {WORLD_SIZE} processes, and each needs a GPU of its own",
            hint="use device: cuda or auto; which GPUs are taken, CUDA_VISIBLE_DEVICES says",
        )
    if target.index is None:
        target = torch.device("cuda", LOCAL_RANK if visible > 1 else 0)
    if target.index >= visible:
        raise InputError(
            f"device: process {LOCAL_RANK} of this machine has no GPU: {visible} are visible, and each process needs "
            "one of its own",
            hint=f"start {visible} processes on this machine (--nproc-per-node {visible}), or fewer",
        )
    return target


def synchronize(device: torch.device) -> None:
    """Waits until a device has done what it was asked: before that, a time is one of asking."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def wanted_dtype(config: PretrainedConfig, device: torch.device, dtype: str) -> torch.dtype:
    """The dtype of frozen weights: `dtype` if named; for `auto`, float32 on a CPU, else the checkpoint's.

    Raises:
        InputError: it is neither.
    """
    if dtype not in ("auto", *DTYPES):
        raise InputError(f"dtype: unknown '{dtype}'{nearest(dtype, ('auto', *DTYPES))}", hint="give one of these")
    return DTYPES.get(dtype) or (torch.float32 if device.type == "cpu" else config.dtype or torch.float32)
