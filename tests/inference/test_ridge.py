"""Ridge regression from sums, beside numpy's exact least squares on whole activations."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor

from layerpeel.inference.ridge import RIDGES, Regression


def tokens(number: int = 60, inputs: int = 5, outputs: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, errors that depend on them, weights, and which are held back."""
    inputs_, noise = torch.randn(number, inputs), torch.randn(number, outputs)
    errors = inputs_ @ torch.randn(inputs, outputs) + 0.5 + 0.1 * noise
    weights = torch.rand(number) + 0.5
    return inputs_, errors * weights[:, None], weights, torch.arange(number) % 8 == 7


def regression(bias: bool, *, parts: int = 1) -> tuple[Regression, tuple[Tensor, Tensor, Tensor, Tensor]]:
    data = tokens()
    made = Regression(5, 3, bias=bias, device=torch.device("cpu"))
    for part in zip(*(each.chunk(parts) for each in data), strict=True):
        made.add(*part)
    return made, data


def least_squares(
    data: tuple[Tensor, Tensor, Tensor, Tensor], bias: bool, ridge: float = 0.0
) -> numpy.typing.NDArray[numpy.float64]:
    """The exact solution: of the weighted tokens, with rows below them that hold the change at zero."""
    inputs, errors, weights, _ = (each.double().numpy() for each in data)
    rows = inputs * weights[:, None]
    penalty = numpy.sqrt(ridge * (rows**2).sum() / rows.shape[1]) * numpy.eye(rows.shape[1] + bias)
    if bias:
        rows = numpy.hstack([rows, weights[:, None]])
        # A constant as large as the other inputs are in the mean is held as they are.
        penalty[-1, -1] = numpy.sqrt(ridge * (weights**2).sum())
    right = numpy.vstack([errors, numpy.zeros((len(penalty), errors.shape[1]))])
    return numpy.linalg.lstsq(numpy.vstack([rows, penalty]), right, rcond=None)[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ridge", [1e-9, 0.1, 3.0])
def test_it_is_the_exact_least_squares_solution(bias: bool, ridge: float) -> None:
    made, data = regression(bias)
    solution = made.solve(ridge)
    assert solution.ridge == ridge
    numpy.testing.assert_allclose(solution.change.numpy(), least_squares(data, bias, ridge), atol=2e-5)


def test_the_error_is_that_of_all_tokens() -> None:
    made, (inputs, errors, weights, _) = regression(bias=False)
    change = torch.randn(5, 3).double()
    expected = (inputs * weights[:, None] @ change.float() - errors).square().sum()
    assert made.error(change) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("first", [1, 2, 3])
def test_inputs_of_another_kind_are_left_out(first: int) -> None:
    inputs, errors, weights, held = tokens()
    both = Regression(5 - first, 3, bias=True, device=torch.device("cpu"), first=0)
    both.add(inputs[:, first:], errors, weights, held)
    made = Regression(5, 3, bias=True, device=torch.device("cpu"), first=first)
    made.add(inputs, errors, weights, held)
    torch.testing.assert_close(made.without_first().solve(0.1).change, both.solve(0.1).change, rtol=1e-4, atol=1e-6)


def test_batches_add_up() -> None:
    torch.manual_seed(0)
    at_once, _ = regression(bias=True)
    torch.manual_seed(0)
    in_parts, _ = regression(bias=True, parts=4)
    torch.testing.assert_close(at_once.solve(0.1).change, in_parts.solve(0.1).change, rtol=1e-4, atol=1e-6)


def test_the_ridge_is_what_does_best_on_tokens_held_back() -> None:
    made, (inputs, errors, weights, held) = regression(bias=False)
    rows = inputs * weights[:, None]

    def error_held(ridge: float) -> float:
        fit = (rows[~held], errors[~held], torch.ones(int((~held).sum())), held[~held])
        change = torch.tensor(least_squares(fit, bias=False, ridge=ridge)).float()
        return float((rows[held] @ change - errors[held]).square().sum())

    chosen = made.solve().ridge
    assert chosen in RIDGES
    errors_held = [error_held(ridge) for ridge in RIDGES]
    falls = next((n for n in range(1, len(RIDGES)) if errors_held[n] >= errors_held[n - 1]), len(RIDGES))
    assert chosen == RIDGES[falls - 1]


def test_noise_changes_nothing() -> None:
    made = Regression(40, 3, bias=False, device=torch.device("cpu"))
    made.add(torch.randn(64, 40), torch.randn(64, 3), torch.ones(64), torch.arange(64) % 2 == 0)
    solution = made.solve()
    assert solution.ridge is None and not solution.change.any()


def test_no_tokens_change_nothing() -> None:
    made = Regression(5, 3, bias=True, device=torch.device("cpu"))
    made.add(torch.zeros(4, 5), torch.zeros(4, 3), torch.ones(4), torch.arange(4) == 3)
    for ridge in (None, 0.1):
        solution = made.solve(ridge)
        assert solution.ridge is None and not solution.change.any()
