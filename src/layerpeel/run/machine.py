"""What a run's numbers and times depend on beside its config: the libraries and the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version

import torch

from layerpeel.run.events import Machine

LIBRARIES = ("layerpeel", "torch", "transformers", "accelerate", "datasets", "tokenizers")


def installed_versions() -> dict[str, str]:
    """The versions of the libraries and of Python."""
    return {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()}


def describe_machine() -> Machine:
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Machine(system=platform.platform(), processor=platform.machine(), cores=os.cpu_count(), gpus=gpus)
