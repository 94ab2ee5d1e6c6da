"""Devices and dtypes to run on."""

from __future__ import annotations

import os

import torch
from transformers import (
    PretrainedConfig,
)

from layerpeel.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(device: str = "auto") -> torch.device:
    """The device to run on: CUDA, then MPS, then CPU, unless one is named."""
    if device != "auto":
        try:
            target = torch.device(device)
        except RuntimeError:
            raise InputError(f"device: unknown device {device!r}", hint="use auto, cpu, cuda or cuda:N") from None
        there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
        if (target.index or 0) >= there.get(target.type, 0):
            raise InputError(f"device: there is no {device} here", hint="use auto, cpu, cuda or cuda:N")
        return target
    if torch.cuda.is_available():  # each process that a launcher started has a GPU of its own
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def wanted_dtype(config: PretrainedConfig, device: torch.device, dtype: str) -> torch.dtype:
    """What the frozen weights are held in: `dtype`, or for `auto` float32 on a CPU, else that of the checkpoint."""
    return DTYPES.get(dtype) or (torch.float32 if device.type == "cpu" else config.dtype or torch.float32)
