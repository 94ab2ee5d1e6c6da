"""Refits a layer's output projections, so that the hidden states after it become those that are needed.

Each projection that writes to the hidden states (`residual_writers`) is refitted by ridge regression (`ridge`), from
what enters it to what the hidden states lack at that place. Tokens count by the inverse square of the size of what is
needed: errors are relative.

Shapes: N tokens, R rows, T tokens, D hidden, I what enters a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from layerpeel.inference.front import Front
from layerpeel.inference.layerwise import run_layer
from layerpeel.inference.linear_weights import LinearWeights
from layerpeel.inference.residual_writers import Writer, Writers
from layerpeel.inference.ridge import Regression
from layerpeel.inference.written_states import WrittenStates, inputs_of, read_writer

SMALLEST = 1e-6  # of a size that is divided by


@dataclass(frozen=True)
class Refit:
    """Of a projection.

    Attributes:
        name: of its module in the layer.
        before, after: the relative squared error of the hidden states after it, mean over tokens and dimensions.
        ridge: in units of the mean square of what enters it; None where it was left as it is.
    """

    name: str
    before: float
    after: float
    ridge: float | None


class LayerRefit:
    """Refits the projections of one layer, one after the other.

    Args:
        front: the text, with the hidden states that enter the layer as `of_student`.
        layer: whose projections are refitted.
        index: of the layer whose arguments it takes.
        writers: of the layer.
        ridge: of all projections; None to choose each one's.
        storage: gives the dtype that a parameter will be saved in, by its name in the layer.
        load: gives the layer other values of parameters, by their names in it.
    """

    def __init__(
        self,
        front: Front,
        layer: nn.Module,
        index: int,
        writers: Writers,
        ridge: float | None,
        storage: Callable[[str], torch.dtype],
        load: Callable[[Mapping[str, Tensor]], None],
    ) -> None:
        self.front, self.layer, self.index, self.writers = front, layer, index, writers
        self.ridge, self.storage, self.load = ridge, storage, load
        self.device = front.layerwise.device

    def refit(self, teacher: nn.Module | None) -> list[Refit]:
        """Refits all that can be.

        Args:
            teacher: the teacher's layer, which `front.of_teacher` enters, if attention's projection can be refitted; it
                moves on. None where a gap follows: there, the teacher is after it already.
        """
        first, last = self.writers.first, self.writers.last
        if not teacher and first and last:
            return self.refit_both(first, last)
        refits = [self.refit_first(first, teacher)] if first and teacher else []
        return [*refits, self.refit_last(last)] if last else refits

    def refit_first(self, writer: Writer, teacher: nn.Module) -> Refit:
        """Refits the projection of attention for the hidden states in a teacher's layer, and moves the teacher on.

        Args:
            teacher: its layer, which `front.of_teacher` enters.
        """

        def read(move: bool) -> Regression:
            fit = self._regression(writer)
            for rows in self.front.batches():
                arguments = self.front.begin_batch(rows)[1][self.index]
                hidden = self.front.of_teacher[rows].to(self.device)
                run = partial(run_layer, teacher, arguments=arguments)
                needed = read_writer(teacher, self.writers, writer, hidden, run, to_end=move)
                if move:
                    assert needed.output is not None
                    self.front.of_teacher[rows] = needed.output.cpu()
                hidden = self.front.of_student[rows].to(self.device)
                run = partial(run_layer, self.layer, arguments=arguments)
                states = read_writer(self.layer, self.writers, writer, hidden, run, to_end=False)
                self._add(fit, writer, states, states.after, needed.after, rows)
                self.front.advance()
            return fit

        return self._refit(writer, read)

    def refit_last(self, writer: Writer) -> Refit:
        """Refits the last projection, for the teacher's hidden states after the layer or a gap that follows it."""
        return self._refit(writer, lambda _: self._read_last(writer))

    def refit_both(self, first: Writer, last: Writer) -> list[Refit]:
        """Refits both projections together, for the teacher's hidden states after a gap that follows the layer.

        The MLP's makes the jump, and that of attention helps. First both are solved for at once, as if the MLP did not
        react to what attention writes; then the MLP's again, for what enters it in fact. Where that leaves more than
        the MLP's alone would, attention's stays as it is.

        Returns:
            of each, with the error of both.
        """
        assert first.projection and last.projection
        name = first.projection.name
        if first.projection.gains is not None or last.projection.gains is not None:
            return [self.refit_last(last)]  # behind a norm, a change of both cannot be foretold
        both = self._read_last(last, first)
        both.sum_over_processes()
        before, (alone, new) = both.error_as_it_is, self._solved(last, both.without_first())
        solution = both.solve(self.ridge)
        weights = LinearWeights.of(self._module(first), first.projection)
        old = {name: value.clone() for name, value in weights.parameters.items()}
        if solution.ridge is None:
            return [self._loaded(last, alone, new)]
        change = solution.change[: both.first]
        padding = len(weights.matrix) - len(change)  # a bias stays
        change = torch.cat([change, change.new_zeros(padding, change.shape[1])])
        self._load(first, weights.changed(change, lambda each: self.storage(f"{name}.{each}")))
        again = self._read_last(last)
        again.sum_over_processes()
        refit, parameters = self._solved(last, again)
        if refit.after >= alone.after:
            self._load(first, old)
            return [self._loaded(last, alone, new)]
        self._loaded(last, refit, parameters)
        error = before / (self.front.tokens * both.outputs)
        return [Refit(name, error, refit.after, solution.ridge), replace(refit, before=error)]

    def _read_last(self, writer: Writer, first: Writer | None = None) -> Regression:
        """The regression of the last projection, or of an earlier one with it."""
        fit = self._regression(writer, first)
        for rows in self.front.batches():
            arguments = self.front.begin_batch(rows)[1][self.index]
            hidden = self.front.of_student[rows].to(self.device)
            run = partial(run_layer, self.layer, arguments=arguments)
            with inputs_of(self.layer, first) as noted:
                states = read_writer(self.layer, self.writers, writer, hidden, run, to_end=True)
            if first:
                given = noted[0].view(*hidden.shape[:2], -1) * (first.scale / writer.scale)
                states.inputs = torch.cat([given, states.inputs], dim=-1)
            assert states.output is not None
            self._add(fit, writer, states, states.output.float(), self.front.of_teacher[rows], rows)
            self.front.advance()
        return fit

    def _refit(self, writer: Writer, read: Callable[[bool], Regression]) -> Refit:
        """Solves for a projection; where a norm follows, measures what came of it, and takes back what is worse.

        Of a norm the regression knows the slope alone, and a large change may turn out otherwise.

        Args:
            read: runs the text through the layer; its argument says whether for the last time.
        """
        assert writer.projection
        if writer.projection.gains is None:
            return self._solve(writer, read(True))
        module = self._module(writer)
        old = {name: value.detach().clone() for name, value in module.named_parameters(recurse=False)}
        refit = self._solve(writer, read(False))
        measured = read(True)
        measured.sum_over_processes()
        after = measured.error_as_it_is / (self.front.tokens * measured.outputs)
        if refit.ridge is None or after <= refit.before:
            return replace(refit, after=refit.before if refit.ridge is None else after)
        self._load(writer, old)
        return replace(refit, after=refit.before, ridge=None)

    def _solve(self, writer: Writer, fit: Regression) -> Refit:
        """Solves a regression, and gives the projection the weights that it says, if they are better."""
        fit.sum_over_processes()
        return self._loaded(writer, *self._solved(writer, fit))

    def _solved(self, writer: Writer, fit: Regression) -> tuple[Refit, dict[str, Tensor]]:
        """What comes of a regression, and the parameters that it says; none if those that are there are no worse.

        What is compared is the error of the weights as they will be saved.
        """
        assert writer.projection
        name = writer.projection.name
        weights = LinearWeights.of(self._module(writer), writer.projection)
        solution = fit.solve(self.ridge)
        new = weights.changed(solution.change, lambda parameter: self.storage(f"{name}.{parameter}"))
        numbers = self.front.tokens * fit.outputs
        before = fit.error_as_it_is / numbers
        after = fit.error(weights.change_to(new, solution.change)) / numbers
        if solution.ridge is None or after > before:
            return Refit(name, before, before, None), {}
        return Refit(name, before, after, solution.ridge), new

    def _loaded(self, writer: Writer, refit: Refit, parameters: Mapping[str, Tensor]) -> Refit:
        """Gives the projection the parameters, and the refit back."""
        if parameters:
            self._load(writer, parameters)
        return refit

    def _regression(self, writer: Writer, first: Writer | None = None) -> Regression:
        """An empty one of a projection, or of an earlier one's inputs and its own."""
        (inputs, outputs), earlier = self._shape(writer), self._shape(first)[0] if first else 0
        bias = self._module(writer).bias is not None
        return Regression(earlier + inputs, outputs, bias=bias, device=self.device, first=earlier)

    def _shape(self, writer: Writer) -> tuple[int, int]:
        """I and D of a projection."""
        weight = self._module(writer).weight
        assert writer.projection and isinstance(weight, Tensor)
        inputs, outputs = weight.shape if writer.projection.transposed else weight.T.shape
        return inputs, outputs

    def _add(
        self, fit: Regression, writer: Writer, states: WrittenStates, hidden: Tensor, needed: Tensor, rows: Tensor
    ) -> None:
        """Adds the tokens of a batch to a regression, but for those that overflow in one of the models.

        Args:
            hidden, needed: [R, T, D], the hidden states after the writer, and those that are needed.
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

    def _module(self, writer: Writer) -> nn.Module:
        assert writer.projection
        return self.layer.get_submodule(writer.projection.name)

    def _load(self, writer: Writer, parameters: Mapping[str, Tensor]) -> None:
        assert writer.projection
        self.load({f"{writer.projection.name}.{name}": value for name, value in parameters.items()})


def _size(hidden: Tensor) -> Tensor:
    """The root of the mean square of each token: [N, D] -> [N]."""
    return hidden.square().mean(-1).sqrt().clamp(min=SMALLEST)
