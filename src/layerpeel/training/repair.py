"""Repair in closed form: projections of a shortened model, solved for what the teacher's hidden states need.

One walk over the student's layers, from the one before the first gap upward. Each projection that writes to the hidden
states (`inference.residual_writers`: attention's and the MLP's output) is refitted by ridge regression
(`inference.ridge`), from what enters it to the difference of the teacher's hidden states and the student's at that
place; each layer sees the repaired ones before it. Before a gap the MLP's alone makes the jump to the states after it.
Tokens count by the inverse square of the size of the teacher's hidden state: errors are relative.

Memory: the hidden states of all tokens at one layer, of teacher and student (2 D numbers a token, in memory or in a
file), and the sums of one projection, 2 (I^2 + I D) numbers in fp32 and twice as many in fp64 while they are solved.

Shapes: N tokens, R rows, T tokens, D hidden, I what enters a projection.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from layerpeel.data.rows import positions_of
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.residual_writers import UnknownWritersError, Writer, Writers, find_writers
from layerpeel.inference.ridge import Regression
from layerpeel.inference.written_states import WrittenStates, read_writer
from layerpeel.model.layer_inputs import LayerInputs
from layerpeel.processes.distributed import sum_numbers
from layerpeel.processes.interrupts import stop_asked, stop_if_asked
from layerpeel.processes.progress import Advance
from layerpeel.training.linear_weights import LinearWeights
from layerpeel.training.repair_states import Front, RepairState
from layerpeel.training.result import RepairedProjection, RepairResult
from layerpeel.training.student import Student

PROBE = (2, 9)  # rows and tokens on which a layer's projections are looked for
SMALLEST = 1e-6  # of a size that is divided by


class RepairWalk:
    """A walk over the layers of a student, which repairs them.

    Args:
        front: the calibration text, whose hidden states move with the walk.
        start: the position in the student where it begins.
        ridge: of all projections; None to choose each one's.
        storage: gives the dtype that a parameter will be saved in, by its name.
        state: where solved projections are kept.
        advance: of the bar, which is `passes` long.

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
        advance: Advance,
    ) -> None:
        self.student, self.teacher, self.front = student, student.teacher, front
        self.start, self.ridge, self.storage, self.state, self.advance = start, ridge, storage, state, advance
        self.device = student.model.device
        self.result = RepairResult(tokens=int(self._sum(float(front.rows.mask.sum()))))

    def walk(self) -> None:
        """Repairs the layers from the start on."""
        kept = self.student.kept_layers
        self._begin(kept.kept[self.start])
        for position in range(self.start, len(kept)):
            self._repair_layer(position, (*kept.kept, kept.total)[position + 1])
            self._move_student(position)
            if self._sum(float(stop_asked())):
                stop_if_asked()

    def _begin(self, layer: int) -> None:
        """Brings the front to the start: the teacher's to the layer of this index."""
        shared = min(self.student.shared_prefix, self.start)
        for rows in self.front.batches():
            self.front.teacher[rows] = self._begin_batch(rows)[0].cpu()
        for index in range(shared):
            self._move_teacher(index)
        self.front.student.copy_(self.front.teacher)
        for index in range(shared, layer):
            self._move_teacher(index)
        for position in range(shared, self.start):
            self._move_student(position)

    def _repair_layer(self, position: int, after: int) -> None:
        """Repairs a layer of the student, and moves the teacher on to where the student will be after it.

        Args:
            after: the teacher layer that comes next.
        """
        layer = self.student.kept_layers.kept[position]
        saved = self.state.load(layer) if self.state else None
        if saved:
            self.student.load_trained(saved[0])
            self.result.projections += saved[1]
            for index in range(layer, after):
                self._move_teacher(index)
            return
        writers = find_layer_writers(self.student, position)
        jumps = after > layer + 1
        projections = []
        if writers and writers.first and not jumps:
            projections.append(self._repair_first(position, writers, writers.first))
        else:
            for index in range(layer, after):
                self._move_teacher(index)
        if writers and writers.last:
            projections.append(self._repair_last(position, writers, writers.last))
        if not projections:
            self.result.unknown.append(layer)
        self.result.projections += projections
        if self.state:
            changed = {n: v for n, v in self.student.trained_state().items() if self.student.layer_of(n) == layer}
            self.state.save(layer, changed, projections)

    def _repair_first(self, position: int, writers: Writers, writer: Writer) -> RepairedProjection:
        """Refits the projection of attention, and moves the teacher on by a layer."""
        layer = self.student.kept_layers.kept[position]
        fit = self._regression(position, writer)
        with self.teacher.weights_loaded(layer):
            for rows in self.front.batches():
                arguments = self._begin_batch(rows)[1][layer]
                hidden = self.front.teacher[rows].to(self.device)
                run = partial(self._run_teacher, layer, arguments)
                needed = read_writer(self.teacher.layers[layer], writers, writer, hidden, run, to_end=True)
                assert needed.output is not None
                self.front.teacher[rows] = needed.output.cpu()
                states = self._read_student(position, writers, writer, rows, arguments, to_end=False)
                self._add(fit, writer, states, states.after, needed.after, rows)
                self.advance()
        return self._solve(position, writer, fit)

    def _repair_last(self, position: int, writers: Writers, writer: Writer) -> RepairedProjection:
        """Refits the last projection of a layer for the teacher's hidden states, where the front has them."""
        layer = self.student.kept_layers.kept[position]
        fit = self._regression(position, writer)
        for rows in self.front.batches():
            arguments = self._begin_batch(rows)[1][layer]
            states = self._read_student(position, writers, writer, rows, arguments, to_end=True)
            assert states.output is not None
            self._add(fit, writer, states, states.output.float(), self.front.teacher[rows], rows)
            self.advance()
        return self._solve(position, writer, fit)

    def _regression(self, position: int, writer: Writer) -> Regression:
        module = self._module(position, writer)
        assert writer.projection
        weight = module.weight if writer.projection.transposed else module.weight.T
        return Regression(*weight.shape, bias=module.bias is not None, device=self.device)  # type: ignore[misc]

    def _add(
        self, fit: Regression, writer: Writer, states: WrittenStates, hidden: Tensor, needed: Tensor, rows: Tensor
    ) -> None:
        """Adds a batch to a regression.

        Args:
            hidden, needed: [R, T, D], the student's hidden states after the writer, and the teacher's.
        """
        mask = self.front.rows.mask[rows].to(self.device)
        needed = needed.to(self.device).float()[mask]
        weights = 1 / _size(needed)
        errors = (needed - hidden[mask]) * weights[:, None]
        assert writer.projection
        if writer.projection.gains is not None:
            weights = weights / _size(states.given[mask].float())
        held = self.front.held[rows].to(self.device)[:, None].expand_as(mask)[mask]
        fit.add(states.inputs[mask].float(), errors, weights * writer.scale, held)

    def _solve(self, position: int, writer: Writer, fit: Regression) -> RepairedProjection:
        """Solves a regression, and gives the projection the weights that it says, if they are better.

        What is compared is the error of the weights as they will be saved.
        """
        fit.sum_over_processes()
        assert writer.projection
        layer, weights = (
            self.student.kept_layers.kept[position],
            LinearWeights.of(self._module(position, writer), writer.projection),
        )
        prefix = f"{self.student.layerwise.architecture.layer_prefix()}.{layer}.{writer.projection.name}"
        solution = fit.solve(self.ridge)
        new = weights.changed(solution.change, lambda name: self.storage(f"{prefix}.{name}"))
        numbers = self.result.tokens * fit.outputs
        before, after = (
            fit.error(change) / numbers
            for change in (torch.zeros_like(solution.change), weights.change_to(new, solution.change))
        )
        if solution.ridge is None or after > before:
            return RepairedProjection(layer, writer.projection.name, before, before, None)
        self.student.load_trained({f"{prefix}.{name}": value for name, value in new.items()})
        return RepairedProjection(layer, writer.projection.name, before, after, solution.ridge)

    # The parts of a pass

    def _module(self, position: int, writer: Writer) -> nn.Module:
        assert writer.projection
        return self.student.layerwise.layers[position].get_submodule(writer.projection.name)

    def _read_student(
        self, position: int, writers: Writers, writer: Writer, rows: Tensor, arguments: LayerInputs, *, to_end: bool
    ) -> WrittenStates:
        return read_writer(
            self.student.layerwise.layers[position],
            writers,
            writer,
            self.front.student[rows].to(self.device),
            lambda hidden: self.student.layerwise.layer(position, hidden, arguments),
            to_end=to_end,
        )

    def _run_teacher(self, layer: int, arguments: LayerInputs, hidden: Tensor) -> Tensor:
        return self.teacher.layer(layer, hidden, arguments)

    def _begin_batch(self, rows: Tensor) -> tuple[Tensor, list[LayerInputs]]:
        batch = self.front.rows.take(rows)
        return self.teacher.begin(batch["input_ids"], positions_of(batch["document"]))

    def _move_teacher(self, index: int) -> None:
        with self.teacher.weights_loaded(index):
            self._move(self.front.teacher, self.teacher, index, index)

    def _move_student(self, position: int) -> None:
        self._move(self.front.student, self.student.layerwise, position, self.student.kept_layers.kept[position])

    def _move(self, states: Tensor, layerwise: LayerwiseModel, position: int, index: int) -> None:
        """Runs a layer on all rows.

        Args:
            index: the teacher's, whose arguments it takes.
        """
        for rows in self.front.batches():
            arguments = self._begin_batch(rows)[1][index]
            states[rows] = layerwise.layer(position, states[rows].to(self.device), arguments).cpu()
            self.advance()

    def _sum(self, number: float) -> float:
        return sum_numbers({"number": number}, self.device)["number"]


@torch.no_grad()
def find_layer_writers(student: Student, position: int) -> Writers | None:
    """What a layer of a student adds to its hidden states; None if that cannot be told. The same in all processes."""
    ids = torch.arange(PROBE[0] * PROBE[1]).view(PROBE) % student.teacher.vocab_size
    hidden, arguments = student.teacher.begin(ids)
    given = arguments[student.kept_layers.kept[position]]
    layer = student.layerwise.layers[position]
    try:
        writers = find_writers(layer, hidden, lambda: student.layerwise.layer(position, hidden, given))
    except UnknownWritersError:
        return None
    return writers if writers.first or writers.last else None


def _size(hidden: Tensor) -> Tensor:
    """The root of the mean square of each token: [N, D] -> [N]."""
    return hidden.square().mean(-1).sqrt().clamp(min=SMALLEST)
