"""What a training needs to go on in the middle, in a folder that is complete or not there.

Each process writes what it holds of tensors that are split between them; the first writes the rest. It is read in any
number of processes, split or not.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.markup import escape
from torch import Tensor
from torch.distributed.tensor import DTensor

from layerpeel.processes.distributed import RANK, WORLD_SIZE, from_main, gather, is_main_process, wait_for_all
from layerpeel.processes.progress import console
from layerpeel.storage.files import remove_paths, sync_folder
from layerpeel.training.result import TrainingResult
from layerpeel.training.state_files import SavedTensor, is_undamaged, open_parts, write_parts

PATIENCE = 20  # times as long as a save took, before the next one: saving takes a twentieth of the time at most
FORMAT = 4  # of the files; a training does not go on from one of another format
WEIGHT = "parameter "  # before the names of trained parameters, among the tensors of a file
AVERAGE = "average "  # and of their means

T = TypeVar("T")


@dataclass(frozen=True)
class Checkpoint(Generic[T]):
    """A training after some of its steps; its tensors are in memory, split or not, or saved ones.

    Attributes:
        weights: the trained parameters, by name.
        optimizer_tensors, optimizers: as `optimizer_state.collect` returns them.
        result: so far.
        skipped: steps that attempts before this one skipped.
        running: the running mean of each loss.
        average: the mean of the trained parameters over the last steps, by name; none before those.
        averaged: over how many steps so far.
    """

    weights: Mapping[str, T]
    optimizer_tensors: Mapping[str, T]
    optimizers: Sequence[Mapping[str, Any]]
    result: TrainingResult
    skipped: int
    running: Mapping[str, float]
    average: Mapping[str, T]
    averaged: int

    def tensors(self) -> dict[str, T]:
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
    def from_parts(cls, tensors: Mapping[str, T], numbers: Mapping[str, Any]) -> Checkpoint[T]:
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
        folder: for the state, and nothing else.
        of: says which training. What the folder holds of another is not used.
        every: seconds between saves, more where they take long; 0 to save after each step.
    """

    def __init__(self, folder: Path, of: str, every: float) -> None:
        self.folder, self.of, self.every = folder, of, every
        self._saved, self._took = time.monotonic(), 0.0

    def for_training(self, settings: str) -> TrainingState:
        """The same place, for a training whose settings have this hash: no other goes on from what it saves."""
        return TrainingState(self.folder, f"{self.of} {settings}", self.every)

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._saved >= max(self.every, PATIENCE * self._took * bool(self.every))

    def save(self, checkpoint: Checkpoint[Tensor]) -> None:
        """Puts a state in the place of the one before; in the first process, returns once it is on the disk.

        Where tensors are split, all processes have to call this, and write at the same time.
        """
        started = time.monotonic()
        tensors, partial = checkpoint.tensors(), self.folder / ".new.partial"
        split = any(isinstance(value, DTensor) for value in tensors.values())
        if is_main_process():
            remove_paths(partial)
            partial.mkdir(parents=True)
        if split:
            wait_for_all()
        if split or is_main_process():
            numbers = {"of": self.of, "format": FORMAT, "files": WORLD_SIZE if split else 1} | checkpoint.to_json()
            write_parts(partial / f"{RANK}.safetensors", tensors, json.dumps(numbers))
        if split:
            wait_for_all()
        if is_main_process():
            self._take(partial)
        self._saved = time.monotonic()
        self._took = self._saved - started

    def load(self) -> Checkpoint[SavedTensor] | None:
        """The state of this training; None if none was saved, or a file is damaged. All processes have to call this."""
        paths = from_main(self._newest)
        if not paths:
            return None
        undamaged = all(gather(all(is_undamaged(path) for path in paths[RANK::WORLD_SIZE])))
        tensors, text = open_parts(paths) if undamaged else ({}, "{}")
        numbers = json.loads(text)
        if numbers.get("files") != len(paths):
            console.print(escape(f"{self.folder}: damaged; the training begins again"))
            return None
        same = numbers["of"] == self.of and numbers.get("format") == FORMAT
        return Checkpoint.from_parts(tensors, numbers) if same else None

    def clear(self) -> None:
        remove_paths(self.folder)

    def _take(self, partial: Path) -> None:
        """Makes a state that was written the newest, and removes those before it."""
        before = self._numbers()
        os.replace(partial, self.folder / str(max(before, default=0) + 1))
        sync_folder(self.folder)
        remove_paths(*(self.folder / str(number) for number in before))

    def _newest(self) -> list[Path]:
        """The files of the state that was saved last, in the order of ranks."""
        numbers = self._numbers()
        folder = self.folder / str(max(numbers, default=0))
        return [folder / f"{rank}.safetensors" for rank in range(len([*folder.iterdir()]))] if numbers else []

    def _numbers(self) -> list[int]:
        """Of the states in the folder; it is more than one where a process died before it removed the older one."""
        return [int(path.name) for path in self.folder.glob("*") if path.name.isdecimal()]
