"""The device and dtype that a model runs in."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from layerpeel.errors import InputError
from layerpeel.processes.distributed import LOCAL_RANK

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str = "auto") -> torch.device:
    """The device named, or for `auto` the first available of CUDA, MPS and CPU.

    Raises:
        InputError: this machine has no such device.
    """
    if device != "auto":
        try:
            target = torch.device(device)
        except RuntimeError:
            raise InputError(f"device: unknown device {device!r}", hint="use auto, cpu, cuda or cuda:N") from None
        device_counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
        if (target.index or 0) >= device_counts.get(target.type, 0):
            raise InputError(f"device: there is no {device} here", hint="use auto, cpu, cuda or cuda:N")
        return target
    if torch.cuda.is_available():  # a launcher starts one process for each GPU
        return torch.device("cuda", LOCAL_RANK)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def wanted_dtype(config: PretrainedConfig, device: torch.device, dtype: str) -> torch.dtype:
    """The dtype of frozen weights: `dtype` if named; for `auto`, float32 on a CPU, else the checkpoint's."""
    return DTYPES.get(dtype) or (torch.float32 if device.type == "cpu" else config.dtype or torch.float32)
