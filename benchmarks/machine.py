"""What figures were measured on."""

from __future__ import annotations

import torch

from layerpeel.run.machine import describe_machine


def machine() -> str:
    """The GPU, if there is one, or the processor; threads, and the version of PyTorch."""
    described = describe_machine()
    device = ", ".join(described.gpus) or f"{described.cores} CPU cores ({described.processor})"
    threads = torch.get_num_threads()
    return f"{device}, {threads} thread{'s' * (threads != 1)}, torch {torch.__version__}"
