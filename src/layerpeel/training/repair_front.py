"""Hidden states of a text between two layers, of teacher and student, and their way through the layers.

Shapes: N rows of this process, R rows of a batch, T tokens, D hidden.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import psutil
import torch
from torch import Tensor

from layerpeel.data.rows import Rows, positions_of
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.layer_inputs import LayerInputs
from layerpeel.processes.progress import Advance
from layerpeel.training.student import Student

MEMORY_SHARE = 0.25  # of what is free: larger states are in a file, which the system keeps in memory where it can


class Front:
    """The text of this process, and its hidden states where a walk over the layers is.

    Args:
        folder: where states go that are large, in a file that is removed; the system's folder for such if not given.
        advance: called when a batch has gone through a layer.

    Attributes:
        rows: of this process.
        held: [N] of bool, which rows are held back.
        of_teacher, of_student: [N, T, D] on the CPU, what enters the next layer of each.
    """

    def __init__(self, student: Student, rows: Rows, held: Tensor, folder: Path | None, advance: Advance) -> None:
        self.student, self.teacher, self.rows, self.held, self.advance = student, student.teacher, rows, held, advance
        self._files = ExitStack()
        shape = (*rows.input_ids.shape, self.teacher.width)
        self.of_teacher, self.of_student = (
            empty_states(shape, student.model.dtype, folder, self._files) for _ in range(2)
        )

    def __enter__(self) -> Front:
        return self

    def __exit__(self, *_: object) -> None:
        del self.of_teacher, self.of_student
        self._files.close()

    def batches(self) -> list[Tensor]:
        """Indices of rows that go through a layer at a time."""
        return list(torch.arange(len(self.rows)).split(batch_rows(self.teacher, self.rows)))

    def begin(self, start: int) -> None:
        """Brings both to where a repair starts: before the student's layer of this position."""
        shared, kept = min(self.student.shared_prefix, start), self.student.kept_layers.kept
        for rows in self.batches():
            self.of_teacher[rows] = self.begin_batch(rows)[0].cpu()
        for index in range(shared):
            self.move_teacher(index)
        self.of_student.copy_(self.of_teacher)
        for index in range(shared, kept[start]):
            self.move_teacher(index)
        for position in range(shared, start):
            with self.student.layer_loaded(position):
                self.move_student(position)

    def begin_batch(self, rows: Tensor) -> tuple[Tensor, list[LayerInputs]]:
        """The first layer's hidden states [R, T, D] of a batch, and the arguments of each of the teacher's layers."""
        batch = self.rows.take(rows)
        return self.teacher.begin(batch["input_ids"], positions_of(batch["document"]))

    def move_teacher(self, index: int) -> None:
        """Runs a layer of the teacher."""
        with self.teacher.weights_loaded(index):
            self._move(self.of_teacher, self.teacher, index, index)

    def move_student(self, position: int) -> None:
        """Runs a layer of the student, which has its weights."""
        self._move(self.of_student, self.student.layerwise, position, self.student.kept_layers.kept[position])

    def _move(self, states: Tensor, layerwise: LayerwiseModel, position: int, index: int) -> None:
        """Runs a layer on all rows.

        Args:
            index: of the teacher's layer, whose arguments it takes.
        """
        for rows in self.batches():
            arguments = self.begin_batch(rows)[1][index]
            hidden = states[rows].to(self.teacher.device)
            states[rows] = layerwise.layer(position, hidden, arguments).cpu()
            self.advance()


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
