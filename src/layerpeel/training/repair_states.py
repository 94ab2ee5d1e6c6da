"""What a repair keeps: hidden states where it is, and the projections that it has solved.

Shapes: N rows, T tokens, D hidden.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from layerpeel.data.rows import Rows
from layerpeel.processes.distributed import is_main_process
from layerpeel.storage.files import remove_paths, whole_file
from layerpeel.training.result import RepairedProjection

MEMORY_SHARE = 0.25  # of what is free: larger states are in a file, which the system keeps in memory where it can


def empty_states(shape: tuple[int, int, int], dtype: torch.dtype, folder: Path | None, stack: ExitStack) -> Tensor:
    """Room for hidden states [N, T, D] on the CPU, or in a file that is mapped to memory, if they are large.

    Args:
        folder: where the file goes; the system's folder for such files if not given.
        stack: removes it.
    """
    size = shape[0] * shape[1] * shape[2]
    if size * dtype.itemsize <= MEMORY_SHARE * psutil.virtual_memory().available:
        return torch.empty(shape, dtype=dtype)
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    place = stack.enter_context(
        tempfile.TemporaryDirectory(dir=folder, prefix=".states.", suffix=".partial", ignore_cleanup_errors=True)
    )
    return torch.from_file(str(Path(place) / "states"), shared=True, size=size, dtype=dtype).view(shape)


class Front:
    """The calibration text of this process, and its hidden states where a walk over the layers is.

    Attributes:
        rows: of this process.
        held: [N] of bool, which rows are held back.
        teacher, student: [N, T, D] on the CPU, what enters the next layer of each.
        batch_rows: how many rows go through a layer at a time.
    """

    def __init__(
        self, rows: Rows, held: Tensor, width: int, dtype: torch.dtype, batch_rows: int, folder: Path | None
    ) -> None:
        self.rows, self.held, self.batch_rows = rows, held, batch_rows
        self._files = ExitStack()
        shape = (*rows.input_ids.shape, width)
        self.teacher, self.student = (empty_states(shape, dtype, folder, self._files) for _ in range(2))

    def __enter__(self) -> Front:
        return self

    def __exit__(self, *_: object) -> None:
        del self.teacher, self.student
        self._files.close()

    def batches(self) -> list[Tensor]:
        """Indices of rows."""
        return list(torch.arange(len(self.rows)).split(self.batch_rows))


class RepairState:
    """A folder for the projections that a repair has solved, a file a layer; a repair that was stopped goes on there.

    Args:
        of: says which repair: what the folder holds of another is not used.
    """

    def __init__(self, folder: Path, of: str) -> None:
        self.folder, self.of = folder, of

    def for_repair(self, settings: str) -> RepairState:
        """The same place, for a repair whose settings have this hash."""
        return RepairState(self.folder, f"{self.of} {settings}")

    def save(self, layer: int, weights: Mapping[str, Tensor], projections: list[RepairedProjection]) -> None:
        """Keeps what was solved of a layer; of several processes the first writes."""
        if not is_main_process():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        header = {"of": self.of, "projections": json.dumps([asdict(each) for each in projections])}
        with whole_file(self._path(layer)) as partial:
            save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, partial, header)

    def load(self, layer: int) -> tuple[dict[str, Tensor], list[RepairedProjection]] | None:
        """What was solved of a layer; None if it was not, or the file is damaged."""
        try:
            with safe_open(self._path(layer), framework="pt") as file:
                header = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        if header.get("of") != self.of:
            return None
        return weights, [RepairedProjection(**each) for each in json.loads(header["projections"])]

    def clear(self) -> None:
        remove_paths(self.folder)

    def _path(self, layer: int) -> Path:
        return self.folder / f"{layer}.safetensors"
