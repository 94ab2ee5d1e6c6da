"""How far the next-token distribution moves from the teacher's once the layers around the gap have made up for it.

For each candidate, the layer before it and the one after it are refitted in closed form (`inference.refitting`) to give
the hidden states that the student gives with the candidate in place, on half of the text's rows; the other half says
what is left. What training makes up for in any case no longer counts against a layer.

Shapes: N rows of this process, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from layerpeel.importance.base import MetricResult, ScoringInputs
from layerpeel.importance.row_sums import RowSums, by_row
from layerpeel.importance.teacher_kl import TeacherKL
from layerpeel.importance.text_metrics import TextBatch, rows_of
from layerpeel.inference.budget import explaining_full_memory
from layerpeel.inference.finite import NotFiniteError
from layerpeel.inference.front import Front, share_of
from layerpeel.inference.layerwise import LayerwiseModel, run_layer
from layerpeel.inference.refitting import LayerRefit
from layerpeel.inference.residual_writers import find_layer_writers
from layerpeel.model.surgery import share
from layerpeel.processes.distributed import sum_numbers
from layerpeel.processes.interrupts import stop_if_any_asked
from layerpeel.processes.progress import progress


class RepairedKL(TeacherKL):
    """KL(teacher || student without the layer, its neighbours refitted), less that of the student as it is."""

    runs_besides = 9
    races = False

    @torch.no_grad()
    def score(self, inputs: ScoringInputs) -> MetricResult:
        text, student = rows_of(inputs), inputs.student
        halves = [text.select(torch.arange(first, len(text), 2)) for first in (0, 1 % len(text))]
        (fitted, held), (measured, _) = (share_of(half, student.device) for half in halves)
        with Front(student, fitted, held) as fit, Front(student, measured, _) as rest:
            return _Walk(self, inputs, fit, rest).walk()


class _Walk:
    """A walk over the student's layers, which takes each candidate out on its way.

    Args:
        fit: the rows to refit on.
        rest: those that say what is left.
    """

    def __init__(self, metric: RepairedKL, inputs: ScoringInputs, fit: Front, rest: Front) -> None:
        self.metric, self.inputs, self.student, self.fit, self.rest = metric, inputs, inputs.student, fit, rest
        self.fronts = (fit, rest)
        self.teacher = _final(inputs.teacher, rest)
        alone = inputs.teacher is inputs.student
        self.as_it_is = 0.0 if alone else self._kl(_final(self.student, rest))

    def walk(self) -> MetricResult:
        """The importance of each candidate."""
        added: list[Tensor] = []
        states = [_first(front) for front in self.fronts]
        before = states
        with progress(f"scoring by {self.metric.name}", len(self.inputs.candidates)) as advance:
            for position in range(max(self.inputs.candidates) + 1):
                if position:
                    before, states = states, self._moved(states, position - 1)
                if position in self.inputs.candidates:
                    added.append(self._cached_without(position, before, states) - self.as_it_is)
                    advance()
                    stop_if_any_asked(self.student.device)
        tokens = self.rest.rows.mask.sum(1).double()
        sums = RowSums(torch.stack(added, dim=1), tokens).of_all_processes()
        return sums.result(sorted(self.inputs.candidates))

    def _moved(self, states: Sequence[Tensor], position: int) -> list[Tensor]:
        """What a layer of the student makes of what enters it, of each front."""
        after = [each.clone() for each in states]
        with self.student.weights_loaded(position):
            for front, each in zip(self.fronts, after, strict=True):
                front.move(each, partial(self.student.layer, position), position)
        return after

    def _cached_without(self, position: int, before: Sequence[Tensor], states: Sequence[Tensor]) -> Tensor:
        """As `_without`, or what was kept of a scoring that was interrupted, if all processes have it."""
        cache, metric = self.inputs.answer_cache, type(self.metric)
        rows = [front.rows.input_ids.tolist() for front in self.fronts]
        key = (metric.__module__, metric.__qualname__, "by row", position, *rows)
        kept = None if cache is None else cache.find_value(*key)
        if not sum_numbers({"lack it": kept is None}, self.student.device)["lack it"]:
            return torch.tensor(kept, dtype=torch.float64)
        with explaining_full_memory(f"in scoring by {self.metric.name}", "score by teacher_kl, or on a larger device"):
            kl = self._without(position, before, states)
        if cache is not None:
            cache.keep_value(kl.tolist(), *key)
        return kl

    def _without(self, position: int, before: Sequence[Tensor], states: Sequence[Tensor]) -> Tensor:
        """The KL of each row without the layer at a position, once its neighbours have been refitted.

        Args:
            before, states: of each front, what enters the layer before the candidate, and what enters the candidate.
        """
        last = len(self.student.layers) - 1
        self.fit.of_teacher.copy_(states[0])
        for front, earlier in zip(self.fronts, before, strict=True):
            front.of_student.copy_(earlier)
        with ExitStack() as loaded:
            for each in range(max(0, position - 1), min(position + 1, last) + 1):
                loaded.enter_context(self.student.weights_loaded(each))
            self.fit.move(self.fit.of_teacher, partial(self.student.layer, position), position)
            if position:
                self._move_refitted(position - 1)
            if position < last:
                self._move_refitted(position + 1, follows=True)
        for each in range(position + 2, last + 1):
            with self.student.weights_loaded(each):
                self.rest.move(self.rest.of_student, partial(self.student.layer, each), each)
        hidden = [self.rest.of_student[rows].to(self.student.device) for rows in self.rest.batches()]
        return self._kl(self._finished(hidden))

    def _move_refitted(self, position: int, *, follows: bool = False) -> None:
        """Refits a copy of a layer, and runs the rows that lack the candidate through it.

        Args:
            follows: whether it comes after the candidate; then the others run through the layer itself.
        """
        layer = self.student.layers[position]
        refitted = share(layer)
        writers = find_layer_writers(self.student, refitted, position)
        run = partial(self.student.layer, position)
        if writers:
            if follows and not writers.first:
                self.fit.move(self.fit.of_teacher, run, position)
            refit = LayerRefit(self.fit, refitted, position, writers, None, _as_it_is, partial(_replace, refitted))
            refit.refit(layer if follows else None)
        for front in self.fronts:
            front.move(front.of_student, partial(run_layer, refitted), position)

    def _finished(self, hidden: Sequence[Tensor]) -> Tensor:
        """The final hidden states at the real tokens of the rows that are measured: batches [B, T, D] to [N, D]."""
        masks = [self.rest.rows.mask[rows].to(self.student.device) for rows in self.rest.batches()]
        parts = [self.student.norm(each)[mask] for each, mask in zip(hidden, masks, strict=True)]
        return torch.cat(parts) if parts else self.teacher[:0]

    def _kl(self, final: Tensor) -> Tensor:
        """The KL of final hidden states [real tokens, D], summed over each row of this process: [N]."""
        kl = by_row(self.metric.distances(self.inputs, final[None], self.teacher)[0], self.rest.rows.mask).cpu()
        if sum_numbers({"not finite": int((~kl.isfinite()).sum())}, self.student.device)["not finite"]:
            raise NotFiniteError(f"scoring by {self.metric.name}: NaN or infinity in the text; try teacher_kl")
        return kl


def _first(front: Front) -> Tensor:
    """What enters the first layer: [N, T, D] on the CPU."""
    front.begin()
    return front.of_teacher.clone()


def _final(layerwise: LayerwiseModel, front: Front) -> Tensor:
    """The final hidden states of a model at the real tokens of a text: [real tokens, D]."""
    batches = [TextBatch.of(front.rows.take(rows), layerwise.device) for rows in front.batches()]
    parts = [batch.final_hidden(layerwise)[0] for batch in batches]
    return torch.cat(parts) if parts else torch.zeros(0, layerwise.width, device=layerwise.device)


def _replace(layer: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Gives a layer other parameters, and leaves the tensors of those that it had as they are."""
    for name, value in parameters.items():
        module, _, parameter = name.rpartition(".")
        setattr(layer.get_submodule(module), parameter, nn.Parameter(value, requires_grad=False))


def _as_it_is(_: str) -> torch.dtype:
    """What is compared here is never saved."""
    return torch.float32
