"""Losses by hand, against dense formulas written out here, and what must hold of every one."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional

from layerpeel.config.distill import LossConfig
from layerpeel.errors import InputError
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.losses.base import NO_LABEL, StepOutputs
from layerpeel.losses.logits import Divergence, LogitLoss
from layerpeel.losses.loss_sum import LossSum
from layerpeel.losses.registry import LOSSES, make_loss
from tests.families import tiny_model

ON_LOGITS = [name for name, loss in LOSSES.items() if issubclass(loss, LogitLoss)]


class PlainHead:
    """A model whose logits are the hidden states, two of them, one position a chunk."""

    vocab_size, device = 2, torch.device("cpu")

    def __init__(self) -> None:
        self.head_module = nn.Linear(2, 2, bias=False).requires_grad_(False)
        self.head_module.weight.copy_(torch.eye(2))

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head_module(hidden[None])[0]

    def logit_rows(self, branches: int = 1) -> int:
        return 1


def outputs(student: Tensor, teacher: Tensor, mask: Tensor, head: Any, **changes: Any) -> StepOutputs:
    """A step of one micro-batch whose hidden states and final ones are the same; the labels count up."""
    labels = (torch.arange(mask.numel()).view(mask.shape) % student.shape[-1]).where(mask, NO_LABEL)
    labels[:, -1] = NO_LABEL
    fields: dict[str, Any] = {
        "student_final": student,
        "teacher_final": teacher,
        "student_hidden": {4: student},
        "teacher_hidden": {4: teacher},
        "mask": mask,
        "labels": labels,
        "student_head": head,
        "teacher_head": head,
        "step_tokens": int(mask.sum()),
        "step_labels": int((labels >= 0).sum()),
    }
    return StepOutputs(**(fields | changes))


def loss_of(name: str, step: StepOutputs, **options: Any) -> Tensor:
    return LossSum({name: LossConfig(**options)})(step)[0]


def dense_logits(model: Any, hidden: Tensor) -> Tensor:
    logits = functional.linear(hidden, model.get_output_embeddings().weight, model.get_output_embeddings().bias)
    logits = logits * getattr(model.config, "logit_scale", 1.0)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def has_gradient_by_hand(kind: Any) -> bool:
    by_autograd = {LogitLoss.value_and_grad, Divergence.value_and_grad, Divergence.between_and_grad, None}
    return not {kind.value_and_grad, getattr(kind, "between_and_grad", None)} <= by_autograd


def dense_loss(name: str, student: Tensor, teacher: Tensor, labels: Tensor, t: float) -> Tensor:
    """The sum over positions, from logits [N, V] in double precision; by a formula of its own if the gradient is."""
    if name == "cross_entropy":
        return functional.cross_entropy(student, labels, ignore_index=NO_LABEL, reduction="sum")
    kind: Any = LOSSES[name]
    if not has_gradient_by_hand(kind):
        loss = kind(temperature=t) if issubclass(kind, Divergence) else kind()
        return loss.value(student, teacher, labels).sum()  # type: ignore[no-any-return]
    p, q = torch.softmax(teacher / t, -1), torch.softmax(student / t, -1)
    m = (p + q) / 2
    forward, backward = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
    even = ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2
    return {"kl": forward, "reverse_kl": backward, "jensen_shannon": even}[name] * t**2


def test_kl_by_hand() -> None:
    teacher = torch.tensor([[[0.75, 0.25], [0.5, 0.5]]]).log()
    student = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).log().requires_grad_(True)
    total = loss_of("kl", outputs(student, teacher, torch.ones(1, 2).bool(), PlainHead()))
    total.backward()
    assert total.item() == pytest.approx((0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2, rel=1e-6)
    assert student.grad is not None
    assert (2 * student.grad).flatten().tolist() == pytest.approx([0.5 - 0.75, 0.5 - 0.25, 0, 0], abs=1e-7)


def test_the_other_logit_losses_by_hand() -> None:
    teacher, student = torch.tensor([[[0.75, 0.25]]]).log(), torch.tensor([[[0.5, 0.5]]]).log()
    step = outputs(student, teacher, torch.ones(1, 1).bool(), PlainHead(), step_labels=1)
    step.labels = torch.tensor([[1]])
    assert loss_of("reverse_kl", step).item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), rel=1e-5)
    mixture = (0.625, 0.375)
    even = sum(p * math.log(p / m) for p, m in zip((0.75, 0.25), mixture, strict=True))
    even += sum(0.5 * math.log(0.5 / m) for m in mixture)
    assert loss_of("jensen_shannon", step).item() == pytest.approx(even / 2, rel=1e-5)
    assert loss_of("cross_entropy", step).item() == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize("reduction", ["token_mean", "sum/100"])
@pytest.mark.parametrize("name", ON_LOGITS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2", "gpt2", "gpt_neox"])
def test_value_and_gradients_are_those_of_the_dense_formula(family: str, name: str, reduction: str) -> None:
    teacher, model = tiny_model(family), tiny_model(family)
    head = model.get_output_embeddings().requires_grad_(True)
    with torch.no_grad():
        head.weight.mul_(1.1)  # so that the heads differ
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    student, final = torch.randn(2, 7, 32, requires_grad=True), torch.randn(2, 7, 32)
    layerwise, options = LayerwiseModel(model), {"temperature": 1.5} if issubclass(LOSSES[name], Divergence) else {}
    layerwise.logit_rows_at_a_time = 2 * 3  # three positions of two models a chunk
    step = outputs(student, final, mask, layerwise, teacher_head=LayerwiseModel(teacher))
    loss_of(name, step, reduction=reduction, weight=2.0, **options).backward()
    value = loss_of(name, step, reduction=reduction, weight=2.0, **options).item()
    gradients = student.grad, head.weight.grad
    student.grad = head.weight.grad = None

    labels = step.labels[mask]
    logits, target = dense_logits(model, student)[mask].double(), dense_logits(teacher, final)[mask].double().detach()
    count = step.step_labels if name == "cross_entropy" else step.step_tokens
    divisor = count if reduction == "token_mean" else 100 * step.step_tokens / (2 * 2048)
    expected = 2 * dense_loss(name, logits, target, labels, 1.5) / divisor
    expected.backward()
    assert value == pytest.approx(expected.item(), rel=1e-5)
    for gradient, expected_gradient in zip(gradients, (student.grad, head.weight.grad), strict=True):
        assert gradient is not None and expected_gradient is not None
        assert (gradient - expected_gradient).norm() <= 1e-5 * expected_gradient.norm()


def test_all_losses_in_one_sweep_are_the_sum_of_each() -> None:
    head, mask = LayerwiseModel(tiny_model("llama")), torch.ones(2, 5, dtype=torch.bool)
    student, teacher = torch.randn(2, 5, 32, requires_grad=True), torch.randn(2, 5, 32)
    step = outputs(student, teacher, mask, head)
    total, parts = LossSum({name: LossConfig(weight=0.5 + i) for i, name in enumerate(LOSSES)})(step)
    total.backward()
    together, student.grad = student.grad, None
    alone = {name: loss_of(name, step) for name in LOSSES}
    assert list(parts) == list(LOSSES)
    for name, part in parts.items():
        assert part.item() == pytest.approx(alone[name].item(), rel=1e-5)
    expected = sum((0.5 + i) * alone[name] for i, name in enumerate(LOSSES))
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(together, student.grad, rtol=1e-4, atol=1e-7)


def test_hidden_mse_by_hand() -> None:
    teacher = torch.tensor([[[2.0, 0.0], [100.0, 0.0]]])
    student = torch.tensor([[[3.0, 1.0], [100.0, 10.0]]])
    both, first = torch.tensor([[True, True]]), torch.tensor([[True, False]])
    step = outputs(student, teacher, both, PlainHead())
    assert loss_of("hidden_mse", step, relative=False).item() == pytest.approx(2 * (1 + 50) / 2)  # two places
    assert loss_of("hidden_mse", step).item() == pytest.approx(2 * (1 / 2 + 50 / 5000) / 2)
    assert loss_of("hidden_mse", step, final=False).item() == pytest.approx((1 / 2 + 50 / 5000) / 2)
    assert loss_of("hidden_mse", outputs(student, teacher, first, PlainHead())).item() == pytest.approx(2 * (1 / 2))


def test_hidden_cosine_by_hand() -> None:
    teacher, student = torch.tensor([[[3.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[5.0, 5.0], [0.0, 9.0]]])
    step = outputs(student, teacher, torch.ones(1, 2).bool(), PlainHead())
    assert loss_of("hidden_cosine", step).item() == pytest.approx(2 * (1 - math.sqrt(0.5)) / 2, rel=1e-5)


def test_a_hidden_loss_at_every_repaired_layer_is_the_mean_over_them() -> None:
    student = {2: torch.tensor([[[1.0]]]), 5: torch.tensor([[[3.0]]])}
    teacher = {2: torch.tensor([[[2.0]]]), 5: torch.tensor([[[5.0]]])}
    final = torch.tensor([[[1.0, 0.0]]])
    step = outputs(final, final, torch.ones(1, 1).bool(), PlainHead(), student_hidden=student, teacher_hidden=teacher)
    assert loss_of("hidden_mse", step, layers="all", relative=False).item() == pytest.approx((1 + 4) / 2)
    assert loss_of("hidden_mse", step, layers="last", relative=False).item() == pytest.approx(4)
    assert LossSum({"hidden_mse": LossConfig(layers="all")}).hidden_layers([2, 5]) == [2, 5]
    assert LossSum({"hidden_mse": LossConfig()}).hidden_layers([2, 5]) == [5]
    assert LossSum({"kl": LossConfig()}).hidden_layers([2, 5]) == []


@pytest.mark.parametrize("name", LOSSES)
class TestEveryLoss:
    def test_equal_states_cost_nothing_and_others_something(self, name: str) -> None:
        head, mask = LayerwiseModel(tiny_model("llama")), torch.ones(2, 5, dtype=torch.bool)
        one, other = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
        if getattr(LOSSES[name], "reads_teacher", True):  # else there is no teacher to equal
            assert loss_of(name, outputs(one, one, mask, head)).item() == pytest.approx(0, abs=1e-6)
        assert loss_of(name, outputs(one, other, mask, head)).item() > 0.01

    def test_padding_does_not_count(self, name: str) -> None:
        head, mask = LayerwiseModel(tiny_model("llama")), torch.tensor([[True] * 3 + [False] * 2])
        one, other = torch.randn(1, 5, 32), torch.randn(1, 5, 32)
        changed = one.clone()
        changed[:, 3:] += 7
        assert loss_of(name, outputs(one, other, mask, head)) == loss_of(name, outputs(changed, other, mask, head))

    def test_where_padding_stands_makes_no_difference(self, name: str) -> None:
        head, (one, other) = LayerwiseModel(tiny_model("llama")), torch.randn(2, 1, 3, 32)
        real = torch.ones(1, 3).bool()
        label = torch.tensor([[5, 6, NO_LABEL]])
        plain = outputs(one, other, real, head, labels=label, step_labels=2)
        for left, right in ((2, 0), (0, 2), (1, 1)):
            pad = (0, 0, left, right)
            step = outputs(
                functional.pad(one, pad),
                functional.pad(other, pad),
                functional.pad(real, pad[2:]),
                head,
                labels=functional.pad(label, pad[2:], value=NO_LABEL),
                step_labels=2,
            )
            assert loss_of(name, step).item() == pytest.approx(loss_of(name, plain).item(), rel=1e-6)

    def test_a_batch_of_eight_is_eight_batches_of_one(self, name: str) -> None:
        head, mask = LayerwiseModel(tiny_model("llama")), torch.arange(6)[None] < torch.randint(1, 7, (8, 1))
        one, other = torch.randn(2, 8, 6, 32)
        batch = outputs(one, other, mask, head)
        alone = [
            outputs(
                one[i : i + 1],
                other[i : i + 1],
                mask[i : i + 1],
                head,
                labels=batch.labels[i : i + 1],
                step_tokens=batch.step_tokens,
                step_labels=batch.step_labels,
            )
            for i in range(8)
        ]
        assert sum(loss_of(name, step).item() for step in alone) == pytest.approx(loss_of(name, batch).item(), rel=1e-5)

    def test_the_gradient_points_downhill(self, name: str) -> None:
        head, mask = LayerwiseModel(tiny_model("llama")), torch.ones(2, 5, dtype=torch.bool)
        one, other = torch.randn(2, 5, 32, requires_grad=True), torch.randn(2, 5, 32)
        value = loss_of(name, outputs(one, other, mask, head))
        value.backward()
        assert one.grad is not None and one.grad.norm() > 0
        with torch.no_grad():
            stepped = one - 0.01 * one.grad / one.grad.norm()
        assert loss_of(name, outputs(stepped, other, mask, head)) < value

    def test_nothing_but_padding_harms_nothing(self, name: str) -> None:
        head, mask = LayerwiseModel(tiny_model("llama")), torch.zeros(1, 5, dtype=torch.bool)
        one = torch.randn(1, 5, 32, requires_grad=True)
        value = loss_of(name, outputs(one, torch.randn(1, 5, 32), mask, head))
        value.backward()
        assert value.item() == 0 and one.grad is not None and not one.grad.any()


def test_balanced_losses_weigh_the_same() -> None:
    losses = LossSum({"kl": LossConfig(), "hidden_mse": LossConfig(weight=3.0)}, balance=True)
    head, mask = LayerwiseModel(tiny_model("llama")), torch.ones(1, 4).bool()
    step = outputs(torch.randn(1, 4, 32), torch.randn(1, 4, 32), mask, head)
    total, parts = losses(step)
    assert total.item() == pytest.approx(parts["kl"].item() + 3 * parts["hidden_mse"].item(), rel=1e-6)
    losses.remember({name: part.item() for name, part in parts.items()})
    assert losses(step)[0].item() == pytest.approx(4 * parts["kl"].item(), rel=1e-5)
    losses.remember({"kl": 0.0, "hidden_mse": parts["hidden_mse"].item()})
    assert losses.running["kl"] == pytest.approx(0.9 * parts["kl"].item(), rel=1e-5)


def test_unknown_losses_and_options_are_named() -> None:
    with pytest.raises(InputError, match=r"unknown loss 'hiden_mse'; did you mean 'hidden_mse'\?"):
        LossSum({"hiden_mse": LossConfig()})
    with pytest.raises(InputError, match=r"distill.losses.kl.reduction: input should be 'token_mean' or 'sum/100'"):
        LossSum({"kl": LossConfig(reduction="mean")})
    with pytest.raises(InputError) as caught:
        LossSum({"kl": LossConfig(tempratur=2.0)})
    assert str(caught.value) == (
        "distill.losses.kl.tempratur: unknown key; did you mean 'temperature'? available: reduction, temperature"
    )
    assert caught.value.hint == "options of kl: weight, reduction, temperature"


class Norm(LogitLoss):
    """A user's loss, whose options have capitals in them and depend on each other."""

    order: Literal["L1", "L2"] = "L2"
    factor: float = 1.0

    @model_validator(mode="after")
    def check_factor(self) -> Norm:
        if self.order == "L1" and self.factor != 1:
            raise ValueError("norm L1 takes no factor")
        return self

    def value(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        return (student_logits - teacher_logits).norm(dim=-1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "l2"}, ".order: input should be 'L1' or 'L2', found 'l2'"),
        ({"order": "L1", "factor": 2.0}, ": norm L1 takes no factor"),
    ],
)
def test_options_of_a_users_loss_are_quoted_as_they_are(options: dict[str, Any], message: str) -> None:
    name = f"{__name__}:Norm"
    with pytest.raises(InputError) as caught:
        make_loss(name, LossConfig(**options))
    assert str(caught.value) == f"distill.losses.{name}{message}"
