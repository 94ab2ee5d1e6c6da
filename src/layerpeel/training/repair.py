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
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from layerpeel.inference.residual_writers import UnknownWritersError, Writer, Writers, find_writers
from layerpeel.inference.ridge import Regression
from layerpeel.inference.written_states import WrittenStates, read_writer
from layerpeel.model.layer_inputs import LayerInputs
from layerpeel.processes.distributed import sum_numbers
from layerpeel.processes.interrupts import stop_asked, stop_if_asked
from layerpeel.training.linear_weights import LinearWeights
from layerpeel.training.repair_front import Front
from layerpeel.training.repair_states import RepairState
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
        self.device = student.model.device
        self.result = RepairResult(tokens=int(self._sum(float(front.rows.mask.sum()))))

    def walk(self) -> None:
        """Repairs the layers from the start on."""
        kept = self.student.kept_layers
        self.front.begin(self.start)
        for position in range(self.start, len(kept)):
            self._repair_layer(position, (*kept.kept, kept.total)[position + 1])
            if self._sum(float(stop_asked())):
                stop_if_asked()

    def _repair_layer(self, position: int, after: int) -> None:
        """Repairs a layer of the student, and moves the teacher on to where the student will be after it.

        Args:
            after: the teacher layer that comes next.
        """
        layer = self.student.kept_layers.kept[position]
        saved = self.state.load(layer) if self.state else None
        writers = None if saved else find_layer_writers(self.student, position)
        first = writers.first if writers and after == layer + 1 else None
        if not first:
            for index in range(layer, after):
                self.front.move_teacher(index)
        with self.student.layer_loaded(position):
            if saved:
                self.student.load_trained(saved[0])
                projections = saved[1]
            else:
                projections = self._solve_layer(position, writers, first) if writers else []
            self.front.move_student(position)
        if self.teacher.streamed:  # what was solved is on the disk
            self.student.drop_trained(layer)
        self.result.projections += projections
        self.result.unknown += [] if projections else [layer]

    def _solve_layer(self, position: int, writers: Writers, first: Writer | None) -> list[RepairedProjection]:
        """Solves for a layer's projections, and keeps what it gets.

        Args:
            first: that of attention, if it is to be solved.
        """
        layer = self.student.kept_layers.kept[position]
        projections = [self._repair_first(position, writers, first)] if first else []
        projections += [self._repair_last(position, writers, writers.last)] if writers.last else []
        if self.state:
            changed = {n: v for n, v in self.student.trained_state().items() if self.student.layer_of(n) == layer}
            self.state.save(layer, changed, projections)
        return projections

    def _repair_first(self, position: int, writers: Writers, writer: Writer) -> RepairedProjection:
        """Refits the projection of attention, and moves the teacher on by a layer."""
        layer = self.student.kept_layers.kept[position]

        def read(move: bool) -> Regression:
            fit = self._regression(position, writer)
            for rows in self.front.batches():
                arguments = self.front.begin_batch(rows)[1][layer]
                hidden = self.front.of_teacher[rows].to(self.device)
                run = partial(self._run_teacher, layer, arguments)
                needed = read_writer(self.teacher.layers[layer], writers, writer, hidden, run, to_end=move)
                if move:
                    assert needed.output is not None
                    self.front.of_teacher[rows] = needed.output.cpu()
                states = self._read_student(position, writers, writer, rows, arguments, to_end=False)
                self._add(fit, writer, states, states.after, needed.after, rows)
                self.front.advance()
            return fit

        return self._refit(position, writer, read)

    def _repair_last(self, position: int, writers: Writers, writer: Writer) -> RepairedProjection:
        """Refits the last projection of a layer for the teacher's hidden states, where the front has them."""
        layer = self.student.kept_layers.kept[position]

        def read(_: bool) -> Regression:
            fit = self._regression(position, writer)
            for rows in self.front.batches():
                arguments = self.front.begin_batch(rows)[1][layer]
                states = self._read_student(position, writers, writer, rows, arguments, to_end=True)
                assert states.output is not None
                self._add(fit, writer, states, states.output.float(), self.front.of_teacher[rows], rows)
                self.front.advance()
            return fit

        return self._refit(position, writer, read)

    def _refit(self, position: int, writer: Writer, read: Callable[[bool], Regression]) -> RepairedProjection:
        """Solves for a projection; where a norm follows, measures what came of it, and takes back what is worse.

        Of a norm the regression knows the slope alone, and a large change may turn out otherwise.

        Args:
            read: runs the text through the layer; its argument says whether for the last time.
        """
        assert writer.projection
        if writer.projection.gains is None:
            return self._solve(position, writer, read(True))
        module = self._module(position, writer)
        old = {name: value.detach().clone() for name, value in module.named_parameters(recurse=False)}
        repaired = self._solve(position, writer, read(False))
        measured = read(True)
        measured.sum_over_processes()
        after = measured.error_as_it_is / (self.result.tokens * measured.outputs)
        if repaired.ridge is None or after <= repaired.before:
            return replace(repaired, after=repaired.before if repaired.ridge is None else after)
        prefix = self._prefix(position, writer)
        self.student.load_trained({f"{prefix}.{name}": value for name, value in old.items()})
        return replace(repaired, after=repaired.before, ridge=None)

    def _regression(self, position: int, writer: Writer) -> Regression:
        module = self._module(position, writer)
        assert writer.projection
        weight = module.weight if writer.projection.transposed else module.weight.T
        return Regression(*weight.shape, bias=module.bias is not None, device=self.device)  # type: ignore[misc]

    def _add(
        self, fit: Regression, writer: Writer, states: WrittenStates, hidden: Tensor, needed: Tensor, rows: Tensor
    ) -> None:
        """Adds the tokens of a batch to a regression, but for those that overflow in one of the models.

        Args:
            hidden, needed: [R, T, D], the student's hidden states after the writer, and the teacher's.
        """
        needed = needed.to(self.device).float()
        mask = self.front.rows.mask[rows].to(self.device) & (needed.sum(-1) + hidden.sum(-1)).isfinite()
        needed = needed[mask]
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
        layer, prefix = self.student.kept_layers.kept[position], self._prefix(position, writer)
        weights = LinearWeights.of(self._module(position, writer), writer.projection)
        solution = fit.solve(self.ridge)
        new = weights.changed(solution.change, lambda name: self.storage(f"{prefix}.{name}"))
        numbers = self.result.tokens * fit.outputs
        before = fit.error_as_it_is / numbers
        after = fit.error(weights.change_to(new, solution.change)) / numbers
        if solution.ridge is None or after > before:
            return RepairedProjection(layer, writer.projection.name, before, before, None)
        self.student.load_trained({f"{prefix}.{name}": value for name, value in new.items()})
        return RepairedProjection(layer, writer.projection.name, before, after, solution.ridge)

    # The parts of a pass

    def _prefix(self, position: int, writer: Writer) -> str:
        """Of the names of a projection's parameters."""
        assert writer.projection
        layer = self.student.kept_layers.kept[position]
        return f"{self.student.layerwise.architecture.layer_prefix()}.{layer}.{writer.projection.name}"

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
            self.front.of_student[rows].to(self.device),
            lambda hidden: self.student.layerwise.layer(position, hidden, arguments),
            to_end=to_end,
        )

    def _run_teacher(self, layer: int, arguments: LayerInputs, hidden: Tensor) -> Tensor:
        return self.teacher.layer(layer, hidden, arguments)

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
        with student.layer_loaded(position):
            writers = find_writers(layer, hidden, lambda: student.layerwise.layer(position, hidden, given))
    except UnknownWritersError:
        return None
    return writers if writers.first or writers.last else None


def _size(hidden: Tensor) -> Tensor:
    """The root of the mean square of each token: [N, D] -> [N]."""
    return hidden.square().mean(-1).sqrt().clamp(min=SMALLEST)
