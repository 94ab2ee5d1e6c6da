"""Losses on logits: a formula alone is enough, and gradients derived by hand are those of the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.losses.base import NO_LABEL
from layerpeel.losses.logits import Divergence, LogitLoss, differentiate
from layerpeel.losses.registry import LOSSES
from tests.families import tiny_model
from tests.losses.test_losses import ON_LOGITS, dense_logits, dense_loss, has_gradient_by_hand, loss_of, outputs


class LogitMSE(LogitLoss):
    """A user's loss: squared error between logits, mean over V."""

    def value(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        return (student_logits - teacher_logits).square().mean(-1)


class LogitMSESum(LogitMSE):
    """The same, which sums over positions itself."""

    def value(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        return super().value(student_logits, teacher_logits, labels).sum()


class Labelled(LogitLoss):
    """A user's loss on the labels, without the teacher: one minus the probability of the next token."""

    reads_teacher = False

    def value(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        assert not teacher_logits.numel()
        probabilities = student_logits.softmax(-1).gather(-1, labels.clamp_min(0)[:, None])[:, 0]
        return (1 - probabilities).where(labels != NO_LABEL, 0.0)


class Hellinger(Divergence):
    """A user's divergence, with a temperature: squared Hellinger distance."""

    def between(self, student: Tensor, teacher: Tensor) -> Tensor:
        return ((student / 2).exp() - (teacher / 2).exp()).square().sum(-1) / 2


def dense_value(name: str, student: Tensor, teacher: Tensor, labels: Tensor, t: float) -> Tensor:
    """The formulas of the classes above, written another way: summed over positions."""
    if name == "Labelled":
        return sum(
            (1 - torch.softmax(row, -1)[label] for row, label in zip(student, labels, strict=True) if label >= 0)
        )  # type: ignore[return-value]
    if name == "Hellinger":
        overlap = (torch.softmax(student / t, -1) * torch.softmax(teacher / t, -1)).sqrt().sum(-1)
        return (1 - overlap).sum() * t**2
    return functional.mse_loss(student, teacher, reduction="sum") / student.shape[-1]


@pytest.mark.parametrize("train_head", [True, False])
@pytest.mark.parametrize("reduction", ["token_mean", "sum/100"])
@pytest.mark.parametrize("kind", [LogitMSE, LogitMSESum, Labelled, Hellinger])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_a_loss_with_a_value_alone_trains_as_its_dense_formula(
    family: str, kind: type[LogitLoss], reduction: str, train_head: bool
) -> None:
    model, teacher_model = tiny_model(family).requires_grad_(False), tiny_model(family).requires_grad_(False)
    head = model.get_output_embeddings()
    head.weight.mul_(1.1)
    head.requires_grad_(train_head)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    student, teacher = torch.randn(2, 7, 32, requires_grad=True), torch.randn(2, 7, 32)
    layerwise = LayerwiseModel(model)
    layerwise.logit_rows_at_a_time = 2 * 3  # three positions of two models a chunk
    step = outputs(student, teacher, mask, layerwise, teacher_head=LayerwiseModel(teacher_model))
    options: dict[str, Any] = {"reduction": reduction, "weight": 2.0}
    options |= {"temperature": 1.5} if kind is Hellinger else {}
    loss = loss_of(f"{__name__}:{kind.__name__}", step, **options)
    loss.backward()
    gradients = [student.grad, *(parameter.grad for parameter in head.parameters())]
    student.grad = None
    head.zero_grad()

    logits = dense_logits(model, student)[mask].double()
    target = dense_logits(teacher_model, teacher)[mask].double()
    divisor = step.step_tokens if reduction == "token_mean" else 100 * step.step_tokens / (2 * 2048)
    expected = 2 * dense_value(kind.__name__, logits, target, step.labels[mask], 1.5) / divisor
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, parameter in zip(gradients, [student, *head.parameters()], strict=True):
        assert (gradient is None) == (parameter.grad is None) == (parameter is not student and not train_head)
        if gradient is not None and parameter.grad is not None:
            assert (gradient - parameter.grad).norm() <= 1e-5 * parameter.grad.norm()


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("name", [name for name in ON_LOGITS if has_gradient_by_hand(LOSSES[name])])
def test_gradients_derived_by_hand_are_those_of_an_independent_formula(name: str, temperature: float) -> None:
    kind: Any = LOSSES[name]
    loss = kind(temperature=temperature) if issubclass(kind, Divergence) else kind()
    student, teacher = 3 * torch.randn(2, 9, 50, dtype=torch.float64)
    labels = torch.arange(9).where(torch.arange(9) != 4, NO_LABEL)
    value, grad = loss.value_and_grad(student.clone(), teacher.clone(), labels)
    for formula in (  # written out in the tests, and the class's own
        lambda logits: dense_loss(name, logits, teacher, labels, temperature),
        lambda logits: loss.value(logits, teacher, labels),
    ):
        expected, expected_grad = differentiate(formula, student)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-8, atol=1e-10)


def test_gradients_may_be_scaled_in_place_whatever_the_formula() -> None:
    logits = torch.randn(3, 5)
    for formula, expected in (
        (lambda x: x.sum(-1), torch.ones(3, 5)),  # autograd gives one number, expanded
        (lambda x: x.detach().square().sum(), torch.zeros(3, 5)),
        (lambda x: torch.ones(3), torch.zeros(3, 5)),
    ):
        _, grad = differentiate(formula, logits)
        torch.testing.assert_close(grad.mul_(2), 2 * expected)
    assert not logits.requires_grad
