"""Metrics of a user's own that are a formula and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from layerpeel.importance.metrics import make_metric
from layerpeel.importance.text_metrics import DistributionMetric, HiddenStateMetric
from layerpeel.inference.answer_cache import AnswerCache
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.surgery import remove_layers
from tests.families import tiny_ids, tiny_model
from tests.importance.test_importance import MASK, text_inputs


class Growth(HiddenStateMetric):
    def measure(self, before: Tensor, after: Tensor) -> Tensor:
        return (after.norm(dim=-1) / before.norm(dim=-1)).log().abs()


class Negated(HiddenStateMetric):
    def measure(self, before: Tensor, after: Tensor) -> Tensor:
        return -(after.norm(dim=-1) / before.norm(dim=-1)).log().abs()


class TotalVariation(DistributionMetric):
    def measure(self, student: Tensor, teacher: Tensor) -> Tensor:
        return (student.exp() - teacher.exp()).abs().sum(-1) / 2


class SummedVariation(TotalVariation):
    def measure(self, student: Tensor, teacher: Tensor) -> Tensor:
        return super().measure(student, teacher).sum()


def test_a_metric_of_hidden_states_is_the_mean_of_its_formula_over_real_tokens() -> None:
    inputs = text_inputs([1, 2])
    with torch.no_grad():
        hidden = inputs.student.model(tiny_ids(), output_hidden_states=True).hidden_states
    for position, importance in make_metric(f"{__name__}:Growth").score(inputs).importance.items():
        before, after = hidden[position][MASK].double(), hidden[position + 1][MASK].double()
        ratio = after.square().sum(-1).sqrt() / before.square().sum(-1).sqrt()
        assert importance == pytest.approx(ratio.log().abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["TotalVariation", "SummedVariation"])
def test_a_metric_of_distributions_compares_each_shorter_model_with_the_teacher(name: str) -> None:
    inputs = text_inputs([1, 3, 4])
    teacher_model = tiny_model("qwen2")
    with torch.no_grad():
        teacher_model.get_output_embeddings().weight.mul_(1.5)
        teacher = teacher_model(tiny_ids()).logits[MASK].double().softmax(-1)
    inputs.teacher = LayerwiseModel(teacher_model)

    @torch.no_grad()
    def distance(removed: list[int]) -> float:
        model = remove_layers(copy.deepcopy(inputs.student.model), removed)
        student = model(tiny_ids()).logits[MASK].double().softmax(-1)
        return (student - teacher).abs().sum(-1).mean().item() / 2

    untouched = distance([])
    assert untouched > 0.01
    for candidate, importance in make_metric(f"{__name__}:{name}").score(inputs).importance.items():
        assert importance == pytest.approx(distance([candidate]) - untouched, abs=1e-6)


def test_metrics_on_the_same_text_do_not_share_cached_answers(tmp_path: Path) -> None:
    inputs = text_inputs([1, 2])
    inputs.answer_cache = AnswerCache(tmp_path / "answers.jsonl", "this model")
    growth = make_metric(f"{__name__}:Growth").score(inputs).importance
    negated = make_metric(f"{__name__}:Negated").score(inputs).importance
    assert negated == {position: -value for position, value in growth.items()}
    assert make_metric(f"{__name__}:Growth").score(inputs).importance == growth


def test_a_metric_has_the_name_that_the_config_gives_it() -> None:
    assert make_metric("teacher_kl").name == "teacher_kl"
    assert make_metric(f"{__name__}:Growth").name == f"{__name__}:Growth"
