"""What a training needs to go on in the middle, in one file that is whole or not there."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from layerpeel.processes.distributed import RANK
from layerpeel.processes.progress import console
from layerpeel.storage.files import whole_file

PATIENCE = 20  # times as long as a save took, before the next one: saving takes a twentieth of the time at most


State = tuple[dict[str, Tensor], dict[str, Any]]


class TrainingState:
    """A place for the state of one training.

    Args:
        path: a safetensors file; numbers are JSON in its header. Of several processes the first writes, and all read.
        of: says which training. What a file holds of another is not used.
        every: seconds between saves, more where they take long; 0 to save after each step.
    """

    def __init__(self, path: Path, of: str, every: float) -> None:
        self.path, self.of, self.every = path, of, every
        self._saved, self._took = time.monotonic(), 0.0

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._saved >= max(self.every, PATIENCE * self._took * bool(self.every))

    def save(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Puts a state in the place of the one before; returns once it is on the disk."""
        started = time.monotonic()
        if not RANK:
            text = json.dumps({"of": self.of, **numbers})
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path) as partial:
                save_file(dict(tensors), partial, {"numbers": text, "sha256": _digest(tensors, text)})
        self._saved = time.monotonic()
        self._took = self._saved - started

    def load(self) -> State | None:
        """The tensors and numbers of this training; None if none were saved, or the file is damaged."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            header, tensors = {}, {}
        text = header.get("numbers", "")
        if header.get("sha256") != _digest(tensors, text):
            console.print(escape(f"{self.path}: damaged; the training begins again"))
            return None
        numbers = json.loads(text)
        return (tensors, numbers) if numbers["of"] == self.of else None

    def clear(self) -> None:
        if not RANK:
            self.path.unlink(missing_ok=True)


def collect(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Trained parameters, and what AdamW knows of each, whole; for the first process only, though all take part."""
    found = {}
    for name, parameter in parameters.items():
        for part, value in {"parameter": parameter, **optimizer.state.get(parameter, {})}.items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            if not RANK:
                found[f"{part} {name}"] = whole.detach().cpu().contiguous()
    return found


def restore(optimizer: torch.optim.AdamW, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]) -> None:
    """Gives AdamW what `collect` found of it; a parameter that no step has touched has no state."""
    for name, parameter in parameters.items():
        if f"step {name}" in saved:
            moments = {part: _like(parameter, saved[f"{part} {name}"]) for part in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": saved[f"step {name}"].clone(), **moments}


def _like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """A saved tensor where its parameter is, split as that is split."""
    if isinstance(parameter, DTensor):
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return torch.empty_like(parameter).copy_(value)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().numpy().data)
    return digest.hexdigest()
