"""Hidden states of a text between two layers, as they are needed and as they are, and their way through layers.

Shapes: N rows of this process, R rows of a batch, T tokens, D hidden.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
import torch
from torch import Tensor

from layerpeel.data.rows import Rows, positions_of
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.layer_inputs import LayerInputs
from layerpeel.processes.distributed import processes_of, sum_numbers
from layerpeel.processes.progress import Advance

MEMORY_SHARE = 0.25  # of what is free: larger states are in a file, which the system keeps in memory where it can
HELD_BACK = 8  # one of so many rows

RunLayer = Callable[[Tensor, LayerInputs], Tensor]
"""Runs a layer on some rows, with its other arguments: [R, T, D] -> [R, T, D]."""


class Front:
    """The text of this process, and its hidden states where a walk over the layers is.

    Args:
        layerwise: the model whose embeddings and arguments of layers both take.
        held: [N] of bool, which rows are held back.
        folder: where states go that are large, in a file that is removed; the system's folder for such if not given.
        advance: called when a batch has gone through a layer.

    Attributes:
        rows: of this process.
        tokens: real ones, of all processes.
        of_teacher, of_student: [N, T, D] on the CPU, what enters the next layer of each.
    """

    def __init__(
        self,
        layerwise: LayerwiseModel,
        rows: Rows,
        held: Tensor,
        folder: Path | None = None,
        advance: Advance | None = None,
    ) -> None:
        self.layerwise, self.rows, self.held, self._advance = layerwise, rows, held, advance
        self.tokens = int(sum_numbers({"tokens": rows.tokens}, layerwise.device)["tokens"])
        self._files = ExitStack()
        shape = (*rows.input_ids.shape, layerwise.width)
        dtype = layerwise.model.dtype
        self.of_teacher, self.of_student = (empty_states(shape, dtype, folder, self._files) for _ in range(2))

    def __enter__(self) -> Front:
        return self

    def __exit__(self, *_: object) -> None:
        del self.of_teacher, self.of_student
        self._files.close()

    def batches(self) -> list[Tensor]:
        """Indices of rows that go through a layer at a time."""
        numbers = torch.arange(len(self.rows))
        return list(numbers.split(batch_rows(self.layerwise, self.rows))) if len(numbers) else []

    def begin(self) -> None:
        """Brings the teacher's before the first layer."""
        for rows in self.batches():
            self.of_teacher[rows] = self.begin_batch(rows)[0].cpu()

    def begin_batch(self, rows: Tensor) -> tuple[Tensor, list[LayerInputs]]:
        """The first layer's hidden states [R, T, D] of a batch, and the arguments of each layer."""
        batch = self.rows.take(rows)
        return self.layerwise.begin(batch["input_ids"], positions_of(batch["document"]))

    def move(self, states: Tensor, run: RunLayer, index: int) -> None:
        """Runs a layer on all rows.

        Args:
            states: [N, T, D], those of teacher or student; they are replaced.
            index: of the layer whose arguments it takes.
        """
        for rows in self.batches():
            arguments = self.begin_batch(rows)[1][index]
            states[rows] = run(states[rows].to(self.layerwise.device), arguments).cpu()
            self.advance()

    def advance(self) -> None:
        """Says that a batch has gone through a layer."""
        if self._advance:
            self._advance()


def share_of(rows: Rows, device: torch.device) -> tuple[Rows, Tensor]:
    """This process's share of some rows, and which of it are held back, for ridges to be judged by: [N] of bool."""
    processes = processes_of(device)
    numbers = torch.arange(processes.process_index, len(rows), processes.num_processes)
    return rows.select(numbers), numbers % HELD_BACK == min(HELD_BACK, len(rows)) - 1


def batch_rows(layerwise: LayerwiseModel, rows: Rows) -> int:
    """How many rows go through a layer at a time."""
    return max(1, layerwise.tokens_per_call // rows.input_ids.shape[1])


def empty_states(shape: tuple[int, int, int], dtype: torch.dtype, folder: Path | None, stack: ExitStack) -> Tensor:
    """Room for hidden states [N, T, D] on the CPU, or in a file that is mapped to memory, if they are large.

    Args:
        stack: removes the file.
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
