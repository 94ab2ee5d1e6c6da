"""Ridge regression from accumulated normal equations: the change of a linear map that makes up for what it lacks.

Solves min over C of |X C - E|^2 + r |C|^2 (Hoerl and Kennard, Technometrics 12, 1970), where E is what the output of a
map lacks: a ridge shrinks to the map as it is, not to zero. Only the sums X^T X, X^T E and |E|^2 are kept, never X.
Each ridge costs a Cholesky factor of X^T X, and few are tried, which takes less than one eigen-decomposition.

Shapes: N tokens, I inputs (with a constant one for the bias, where there is one), O outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from layerpeel.processes.distributed import sum_tensors

# In units of the mean diagonal of X^T X. Smaller ones fit more text like that at hand, and make other text worse
# (benchmarks/healing.py).
RIDGES = (3.0, 1.0, 0.3, 0.1)


class NormalEquations:
    """The sums over tokens of which a regression is made: I^2 + I O numbers, in fp32."""

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.gram = torch.zeros(inputs, inputs, device=device)
        self.cross = torch.zeros(inputs, outputs, device=device)
        self.square = torch.zeros(1, device=device)

    def add(self, inputs: Tensor, errors: Tensor) -> None:
        """Adds tokens: X [N, I] and E [N, O], in fp32, both multiplied by the tokens' weights."""
        self.gram.addmm_(inputs.T, inputs)
        self.cross.addmm_(inputs.T, errors)
        self.square += errors.square().sum()

    def sum_over_processes(self) -> None:
        """Adds up what all processes have; every process has to call it."""
        sum_tensors([self.gram, self.cross, self.square])

    def take_rows(self, other: NormalEquations, start: int) -> None:
        """Takes over the sums of another's inputs from one on."""
        self.gram, self.cross, self.square = other.gram[start:, start:], other.cross[start:], other.square

    def doubled(self, scale: Tensor, other: NormalEquations | None = None) -> NormalEquations:
        """The same in fp64, in which they are solved; on the CPU, if the device has no fp64.

        Args:
            scale: [I, 1], what the inputs are multiplied by.
            other: whose sums are added.
        """
        result = NormalEquations(0, 0, scale.device)
        for name in ("gram", "cross", "square"):
            value = getattr(self, name).to(scale)
            setattr(result, name, value.add_(getattr(other, name).to(scale)) if other else value)
        result.gram.mul_(scale).mul_(scale.T)
        result.cross.mul_(scale)
        return result

    def solve(self, ridge: float) -> Tensor:
        """The change C, [I, O]; a ridge in units of the mean diagonal."""
        diagonal = self.gram.diagonal()
        penalty = ridge * diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
        regular = self.gram.clone()
        regular.diagonal().add_(penalty)
        return torch.cholesky_solve(self.cross, torch.linalg.cholesky(regular))

    def error(self, change: Tensor) -> float:
        """|X C - E|^2, for a change in the dtype of the sums."""
        return float(self.square.double() + (change * (self.gram @ change - 2 * self.cross)).sum(dtype=torch.float64))


@dataclass(frozen=True)
class Solution:
    """Of a regression.

    Attributes:
        change: C, [I, O] in fp64; zeros where no ridge makes the error smaller.
        ridge: in units of the mean diagonal; None where nothing is to be changed.
    """

    change: Tensor
    ridge: float | None


class Regression:
    """The regression of one linear map, over tokens to fit and others that are held back, to judge ridges by.

    Args:
        inputs, outputs: of the map, without the bias.
        bias: whether it has one; a constant is then the last input.
        first: how many of the inputs are of another kind, as those of a second map whose output is added.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool, device: torch.device, first: int = 0) -> None:
        self.bias, self.outputs, self.first = bias, outputs, first
        self.fit, self.held = (NormalEquations(inputs + bias, outputs, device) for _ in range(2))

    def add(self, inputs: Tensor, errors: Tensor, weights: Tensor, held: Tensor) -> None:
        """Adds N tokens.

        Args:
            inputs: [N, I] in fp32, without the constant.
            errors: [N, O] in fp32, multiplied by the weights that errors have.
            weights: [N], of the inputs.
            held: [N] of bool.
        """
        inputs = inputs * weights[:, None]
        if self.bias:
            inputs = torch.cat([inputs, weights[:, None]], dim=1)
        self.fit.add(inputs[~held], errors[~held])
        self.held.add(inputs[held], errors[held])

    def sum_over_processes(self) -> None:
        """Adds up what all processes have; every process has to call it."""
        for equations in (self.fit, self.held):
            equations.sum_over_processes()

    def solve(self, ridge: float | None = None) -> Solution:
        """Solves it over all tokens; with the ridge that does best on those held back, if none is given."""
        scale = self._scale()
        if ridge is None:
            ridge = best_ridge(self.fit.doubled(scale), self.held, scale)
        if ridge is None or not self.error_as_it_is:
            return Solution(torch.zeros(self.fit.cross.shape, dtype=scale.dtype, device=scale.device), None)
        return Solution(self.fit.doubled(scale, self.held).solve(ridge) * scale, ridge)

    @property
    def error_as_it_is(self) -> float:
        """|E|^2 over all tokens."""
        return float(self.fit.square.double() + self.held.square.double())

    def error(self, change: Tensor) -> float:
        """|X C - E|^2 over all tokens, for a change [I, O] in fp64."""
        return self.fit.doubled(torch.ones_like(change[:, :1]), self.held).error(change)

    def without_first(self) -> Regression:
        """The regression on the inputs that are not of another kind."""
        rest = Regression(0, self.outputs, bias=self.bias, device=self.fit.gram.device)
        for name in ("fit", "held"):
            getattr(rest, name).take_rows(getattr(self, name), self.first)
        return rest

    def _scale(self) -> Tensor:
        """[I, 1] in fp64: what makes the constant, and inputs of another kind, as large as the others are in the mean.

        So a ridge means the same to them.
        """
        gram = self.fit.gram
        device = gram.device if gram.device.type in ("cpu", "cuda") else torch.device("cpu")
        diagonal = (gram.diagonal() + self.held.gram.diagonal()).to(device).double()
        scale = torch.ones_like(diagonal)
        size = diagonal[self.first : len(diagonal) - self.bias].mean()
        if self.bias and diagonal[-1] > 0:
            scale[-1] = (size / diagonal[-1]).sqrt()
        if self.first and diagonal[: self.first].any():
            scale[: self.first] = (size / diagonal[: self.first].mean()).sqrt()
        return scale[:, None]


def best_ridge(fit: NormalEquations, held: NormalEquations, scale: Tensor) -> float | None:
    """The ridge of those in `RIDGES` with the least error on tokens held back; None if each makes it larger.

    From the largest down, until the error grows.

    Args:
        fit: of inputs that are multiplied by `scale`.
    """
    best, least = None, float(held.square)
    for ridge in RIDGES:
        error = held.error((fit.solve(ridge) * scale).to(held.gram))
        if error >= least:
            break
        best, least = ridge, error
    return best
