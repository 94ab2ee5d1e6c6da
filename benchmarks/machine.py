"""What figures were measured on."""

from __future__ import annotations

import torch

from layerpeel.run.folder import describe_machine


def machine() -> str:
    """The GPU, if there is one, or the processor; threads, and the version of PyTorch."""
    found = describe_machine()
    device = ", ".join(found["gpus"]) or f"{found['cores']} CPU cores ({found['processor']})"
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
