"""Losses by hand, and what holds of every loss that is listed."""

from __future__ import annotations

import math

import pytest
import torch

from layerpeel.config import LossConfig
from layerpeel.errors import InputError
from layerpeel.losses import LOSSES, LossSum, StepOutputs
from layerpeel.losses import kl as kl_module
from layerpeel.losses.kl import chunked_kl
from layerpeel.stack import Stack
from tests.families import tiny_model


def outputs(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, head: Stack) -> StepOutputs:
    return StepOutputs(student, teacher, student, teacher, mask, int(mask.sum()), 1, head)


class PlainHead:
    """A head whose logits are the hidden states."""

    def logit_rows(self, streams: int = 1) -> int:
        return 1

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def test_kl_of_two_coins_by_hand() -> None:
    teacher = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    student = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log().requires_grad_(True)
    total = chunked_kl(student, teacher, PlainHead())
    total.backward()
    assert total.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert student.grad.flatten().tolist() == pytest.approx([0.5 - 0.75, 0.5 - 0.25, 0, 0], abs=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2"])
def test_chunks_equal_the_dense_formula(family: str, temperature: float) -> None:
    model = tiny_model(family)
    stack = Stack(model)
    student, teacher = torch.randn(7, 32, requires_grad=True), torch.randn(7, 32)
    stack.logit_rows_at_a_time = 2 * 3  # three positions of two models a chunk
    total = chunked_kl(student, teacher, stack, temperature)
    total.backward()
    own, student.grad = student.grad, None

    def dense(hidden: torch.Tensor) -> torch.Tensor:
        logits = model.lm_head(hidden) * getattr(model.config, "logit_scale", 1.0)
        cap = getattr(model.config, "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    q = torch.log_softmax(dense(student) / temperature, -1)
    p = torch.softmax(dense(teacher) / temperature, -1).detach()
    expected = (p * (p.log() - q)).sum() * temperature**2
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(own, student.grad, rtol=1e-4, atol=1e-6)


def test_hidden_mse_by_hand() -> None:
    teacher = torch.tensor([[[2.0, 0.0], [100.0, 0.0]]])
    student = torch.tensor([[[3.0, 1.0], [100.0, 10.0]]])
    both = torch.tensor([[True, True]])
    plain, _ = LossSum({"hidden_mse": LossConfig(relative=False)})(outputs(student, teacher, both, PlainHead()))
    assert plain.item() == pytest.approx(2 * (1 + 50) / 2)  # two places
    relative, _ = LossSum({"hidden_mse": LossConfig()})(outputs(student, teacher, both, PlainHead()))
    assert relative.item() == pytest.approx(2 * (1 / 2 + 50 / 5000) / 2)
    first = torch.tensor([[True, False]])
    masked, _ = LossSum({"hidden_mse": LossConfig()})(outputs(student, teacher, first, PlainHead()))
    assert masked.item() == pytest.approx(2 * (1 / 2))


@pytest.mark.parametrize("name", LOSSES)
class TestEveryLoss:
    def test_equal_states_cost_nothing_and_others_something(self, name: str) -> None:
        head, mask = Stack(tiny_model("llama")), torch.ones(2, 5, dtype=torch.bool)
        one, other = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
        loss = LossSum({name: LossConfig()})
        assert loss(outputs(one, one, mask, head))[0].item() == pytest.approx(0, abs=1e-6)
        assert loss(outputs(one, other, mask, head))[0].item() > 0.01

    def test_padding_does_not_count(self, name: str) -> None:
        head, mask = Stack(tiny_model("llama")), torch.tensor([[True] * 3 + [False] * 2])
        one, other = torch.randn(1, 5, 32), torch.randn(1, 5, 32)
        changed = one.clone()
        changed[:, 3:] += 7
        loss = LossSum({name: LossConfig()})
        assert loss(outputs(one, other, mask, head))[0] == loss(outputs(changed, other, mask, head))[0]

    def test_the_gradient_points_downhill(self, name: str) -> None:
        head, mask = Stack(tiny_model("llama")), torch.ones(2, 5, dtype=torch.bool)
        one, other = torch.randn(2, 5, 32, requires_grad=True), torch.randn(2, 5, 32)
        loss = LossSum({name: LossConfig()})
        value = loss(outputs(one, other, mask, head))[0]
        value.backward()
        assert one.grad.norm() > 0
        with torch.no_grad():
            stepped = one - 0.01 * one.grad / one.grad.norm()
        assert loss(outputs(stepped, other, mask, head))[0] < value

    def test_nothing_but_padding_harms_nothing(self, name: str) -> None:
        head, mask = Stack(tiny_model("llama")), torch.zeros(1, 5, dtype=torch.bool)
        one = torch.randn(1, 5, 32, requires_grad=True)
        value = LossSum({name: LossConfig()})(outputs(one, torch.randn(1, 5, 32), mask, head))[0]
        value.backward()
        assert value.item() == 0 and not one.grad.any()


def test_the_papers_reduction_averages_over_micro_batches() -> None:
    student, teacher = torch.randn(1, 6, 2), torch.randn(1, 6, 2)
    mask = torch.ones(1, 6, dtype=torch.bool)
    step = outputs(student, teacher, mask, PlainHead())
    step.micro_batches = 4
    total = chunked_kl(student[0], teacher[0], PlainHead())
    assert LossSum({"kl": LossConfig(reduction="sum/100")})(step)[0].item() == pytest.approx(total.item() / 400)


def test_unknown_losses_and_options_are_named() -> None:
    with pytest.raises(InputError, match=r"unknown loss 'hiden_mse'; did you mean 'hidden_mse'\?"):
        LossSum({"hiden_mse": LossConfig()})
    with pytest.raises(InputError, match=r"distill.losses.kl.reduction: input should be 'token_mean' or 'sum/100'"):
        LossSum({"kl": LossConfig(reduction="mean")})
    assert kl_module.KL().temperature == 1.0
