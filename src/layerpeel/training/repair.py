"""Repair in closed form: projections of a shortened model, solved for what the teacher's hidden states need.

One walk over the student's layers, from the one before the first gap upward. Each projection that writes to the hidden
states (attention's and the MLP's output) is refitted (`inference.refitting`), from what enters it to the difference of
the teacher's hidden states and the student's at that place; each layer sees the repaired ones before it. Before a gap
both make the jump to the states after it.

Memory: the hidden states of all tokens at one layer, of teacher and student (2 D numbers a token, in memory or in a
file), and the sums of one projection, 2 (I^2 + I D) numbers in fp32 and twice as many in fp64 while they are solved.

Shapes: N tokens, D hidden, I what enters a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from layerpeel.inference.budget import explaining_full_memory
from layerpeel.inference.front import Front
from layerpeel.inference.refitting import LayerRefit
from layerpeel.inference.residual_writers import Writers, find_layer_writers
from layerpeel.processes.distributed import wait_for_all
from layerpeel.processes.interrupts import stop_if_any_asked
from layerpeel.training.repair_states import RepairState
from layerpeel.training.result import RepairedProjection, RepairResult
from layerpeel.training.student import Student

LESS_MEMORY = "set distill.repair: false, or use `layerpeel repair` with device: cpu, for the host's memory"


class RepairWalk:
    """A walk over the layers of a student, which repairs them.

    Args:
        front: the calibration text, whose hidden states move with the walk.
        start: the position in the student where it begins.
        ridge: of all projections; None to choose each one's.
        storage: gives the dtype that a parameter will be saved in, by its name.
        state: where solved projections are kept; where layers are streamed, they are read from there afterwards.

    Attributes:
        result: what was done so far.
    """

    def __init__(
        self,
        student: Student,
        front: Front,
        start: int,
        ridge: float | None,
        storage: Callable[[str], torch.dtype],
        state: RepairState | None,
    ) -> None:
        self.student, self.teacher, self.front = student, student.teacher, front
        self.start, self.ridge, self.storage, self.state = start, ridge, storage, state
        self.result = RepairResult(tokens=front.tokens)

    def walk(self) -> None:
        """Repairs the layers from the start on."""
        self._begin()
        kept = self.student.kept_layers
        for position in range(self.start, len(kept)):
            with explaining_full_memory(f"in the repair of layer {kept.kept[position]}", LESS_MEMORY):
                self._repair_layer(position, (*kept.kept, kept.total)[position + 1])
            stop_if_any_asked(self.teacher.device)
        if self.teacher.streamed and self.state:
            wait_for_all()  # the main process has written what is solved
            self.student.keep_on_disk(self.state.tensors(self.result.layers))

    def _begin(self) -> None:
        """Brings the hidden states of both before the student's layer where the repair starts."""
        shared, kept = min(self.student.shared_prefix, self.start), self.student.kept_layers.kept
        self.front.begin()
        for index in range(shared):
            self._move_teacher(index)
        self.front.of_student.copy_(self.front.of_teacher)
        for index in range(shared, kept[self.start]):
            self._move_teacher(index)
        for position in range(shared, self.start):
            with self.student.layer_loaded(position):
                self._move_student(position)

    def _repair_layer(self, position: int, after: int) -> None:
        """Repairs a layer of the student, and moves the teacher on to where the student will be after it.

        Args:
            after: the teacher layer that comes next.
        """
        layer = self.student.kept_layers.kept[position]
        saved = self.state.load(layer) if self.state else None
        writers = None if saved else writers_at(self.student, position)
        leaps = after > layer + 1
        if leaps or not (writers and writers.first):
            for index in range(layer, after):
                self._move_teacher(index)
        with self.student.layer_loaded(position):
            if saved:
                self.student.load_trained(saved[0])
                projections = saved[1]
            else:
                projections = self._solve_layer(position, writers, leaps) if writers else []
            self._move_student(position)
        if self.teacher.streamed:  # what was solved is on the disk
            self.student.drop_trained(layer)
        self.result.projections += projections
        self.result.unknown += [] if projections else [layer]

    def _solve_layer(self, position: int, writers: Writers, leaps: bool) -> list[RepairedProjection]:
        """Solves for a layer's projections, and keeps what it gets.

        Args:
            leaps: whether a gap follows the layer.
        """
        layer = self.student.kept_layers.kept[position]
        prefix = f"{self.student.layerwise.architecture.layer_prefix()}.{layer}"

        def load(parameters: Mapping[str, Tensor]) -> None:
            self.student.load_trained({f"{prefix}.{name}": value for name, value in parameters.items()})

        def storage(name: str) -> torch.dtype:
            return self.storage(f"{prefix}.{name}")

        module = self.student.layerwise.layers[position]
        refit = LayerRefit(self.front, module, layer, writers, self.ridge, storage, load)
        refits = refit.refit(None if leaps else self.teacher.layers[layer])
        projections = [RepairedProjection(layer, each.name, each.before, each.after, each.ridge) for each in refits]
        if self.state:
            changed = {n: v for n, v in self.student.trained_state().items() if self.student.layer_of(n) == layer}
            self.state.save(layer, changed, projections)
        return projections

    def _move_teacher(self, index: int) -> None:
        with self.teacher.weights_loaded(index):
            self.front.move(self.front.of_teacher, partial(self.teacher.layer, index), index)

    def _move_student(self, position: int) -> None:
        """Runs a layer of the student, which has its weights."""
        index = self.student.kept_layers.kept[position]
        self.front.move(self.front.of_student, partial(self.student.layerwise.layer, position), index)


def writers_at(student: Student, position: int) -> Writers | None:
    """What a layer of a student adds to its hidden states; None if that cannot be told. The same in all processes."""
    with student.layer_loaded(position):
        index = student.kept_layers.kept[position]
        return find_layer_writers(student.teacher, student.layerwise.layers[position], index)
