"""What a training needs to go on in the middle, in one file that is complete or not there."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from layerpeel.processes.distributed import is_main_process
from layerpeel.processes.progress import console
from layerpeel.storage.files import whole_file
from layerpeel.training.result import TrainingResult

PATIENCE = 20  # times as long as a save took, before the next one: saving takes a twentieth of the time at most
FORMAT = 3  # of the file; a training does not go on from one of another format
WEIGHT = "parameter "  # before the names of trained parameters, among the tensors of a file
AVERAGE = "average "  # and of their means


@dataclass(frozen=True)
class Checkpoint:
    """A training after some of its steps.

    Attributes:
        weights: the trained parameters, by name.
        optimizer_tensors, optimizers: as `optimizer_state.collect` returns them.
        result: so far.
        skipped: steps that attempts before this one skipped.
        running: the running mean of each loss.
        average: the mean of the trained parameters over the last steps, by name; none before those.
        averaged: over how many steps so far.
    """

    weights: Mapping[str, Tensor]
    optimizer_tensors: Mapping[str, Tensor]
    optimizers: Sequence[Mapping[str, Any]]
    result: TrainingResult
    skipped: int
    running: Mapping[str, float]
    average: Mapping[str, Tensor]
    averaged: int

    def tensors(self) -> dict[str, Tensor]:
        named = {f"{WEIGHT}{name}": value for name, value in self.weights.items()}
        named |= {f"{AVERAGE}{name}": value for name, value in self.average.items()}
        return named | dict(self.optimizer_tensors)

    def to_json(self) -> dict[str, Any]:
        """All but the tensors."""
        return {
            "result": asdict(self.result),
            "skipped": self.skipped,
            "running": dict(self.running),
            "optimizers": list(self.optimizers),
            "averaged": self.averaged,
        }

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Checkpoint:
        """From what `tensors` and `to_json` returned."""
        weights, average = (
            {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            for prefix in (WEIGHT, AVERAGE)
        )
        return cls(
            weights,
            {name: value for name, value in tensors.items() if not name.startswith((WEIGHT, AVERAGE))},
            numbers["optimizers"],
            TrainingResult(**numbers["result"]),
            numbers["skipped"],
            numbers["running"],
            average,
            numbers["averaged"],
        )


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

    def for_training(self, settings: str) -> TrainingState:
        """The same place, for a training whose settings have this hash: no other goes on from what it saves."""
        return TrainingState(self.path, f"{self.of} {settings}", self.every)

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._saved >= max(self.every, PATIENCE * self._took * bool(self.every))

    def save(self, checkpoint: Checkpoint) -> None:
        """Puts a state in the place of the one before; returns once it is on the disk."""
        started = time.monotonic()
        if is_main_process():
            text = json.dumps({"of": self.of, "format": FORMAT} | checkpoint.to_json())
            tensors = checkpoint.tensors()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path) as partial:
                save_file(tensors, partial, {"numbers": text, "sha256": _digest(tensors, text)})
        self._saved = time.monotonic()
        self._took = self._saved - started

    def load(self) -> Checkpoint | None:
        """The state of this training; None if none was saved, or the file is damaged."""
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
        same = numbers["of"] == self.of and numbers.get("format") == FORMAT
        return Checkpoint.from_parts(tensors, numbers) if same else None

    def clear(self) -> None:
        if is_main_process():
            self.path.unlink(missing_ok=True)


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
