"""Metrics of a user's own that are a formula and nothing else."""

from __future__ import annotations

import copy
import statistics
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from layerpeel.config.score import RaceConfig, ScoreConfig
from layerpeel.data.rows import Rows
from layerpeel.errors import InputError
from layerpeel.importance.base import MetricResult
from layerpeel.importance.metrics import make_metric
from layerpeel.importance.row_sums import LEAST_ROWS, RowSums, race_stages
from layerpeel.importance.scoring import score_candidates
from layerpeel.importance.text_metrics import DistributionMetric, HiddenStateMetric
from layerpeel.inference.answer_cache import AnswerCache
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.surgery import KeptLayers, remove_layers
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


def test_a_metric_of_distributions_compares_each_shorter_model_with_the_teacher() -> None:
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
    for candidate, importance in make_metric(f"{__name__}:TotalVariation").score(inputs).importance.items():
        assert importance == pytest.approx(distance([candidate]) - untouched, abs=1e-6)


def test_a_metric_that_sums_over_tokens_is_refused() -> None:
    with pytest.raises(InputError, match=r"`measure` gives \[\], expected a number for each token, \[31\]"):
        make_metric(f"{__name__}:SummedVariation").score(text_inputs([1]))


def test_the_standard_error_of_a_mean_over_rows() -> None:
    # The mean is 9 / 4; rows lie -0.25, 1.5 and -1.25 from what their tokens would have: sqrt(3.875 * 3 / 2) / 4
    sums = RowSums(torch.tensor([[2.0], [6.0], [1.0]]).double(), torch.tensor([1.0, 2.0, 1.0]).double())
    assert sums.mean() == [2.25] and sums.stderr() == pytest.approx([0.602729], abs=1e-6)
    assert RowSums(sums.values[:1], sums.tokens[:1]).result([4]) == MetricResult({4: 2.0})


@pytest.mark.parametrize("name", ["teacher_kl", "TotalVariation", "Growth"])
def test_standard_errors_are_those_of_rows(name: str) -> None:
    """Rows of equal length: the textbook's, of each row scored by itself."""
    metric = make_metric(name if name == "teacher_kl" else f"{__name__}:{name}")
    inputs, rows = text_inputs([1, 3]), Rows(tiny_ids(), torch.ones(3, 17, dtype=torch.bool))
    inputs.text = rows
    together, apart = metric.score(inputs), []
    for row in range(3):
        inputs.text = rows.select(torch.tensor([row]))
        apart.append(metric.score(inputs))
        assert not apart[-1].stderr
    for position in (1, 3):
        alone = [result.importance[position] for result in apart]
        assert together.importance[position] == pytest.approx(statistics.mean(alone), rel=1e-4)
        assert together.stderr[position] == pytest.approx(statistics.stdev(alone) / 3**0.5, rel=1e-4)


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


def text_of(rows: int) -> Rows:
    return Rows(tiny_ids(rows, 17), torch.ones(rows, 17, dtype=torch.bool))


def test_a_race_on_text_drops_what_is_surely_worse_and_keeps_the_best() -> None:
    inputs = text_inputs([1, 2, 3, 4])
    inputs.text = text_of(64)
    full = make_metric("teacher_kl").score(inputs)
    assert not full.dropped and full.stderr
    best = min(full.importance, key=full.importance.__getitem__)
    inputs.config = ScoreConfig(decide="teacher_kl", race=RaceConfig())
    raced = make_metric("teacher_kl").score(inputs)
    assert raced.dropped and best not in raced.dropped
    assert set(raced.dropped.values()) <= {8 / 64, 12 / 64, 18 / 64, 27 / 64, 41 / 64, 62 / 64}
    for position, share in raced.dropped.items():
        rows = torch.cat(race_stages(64, RaceConfig()))[: round(64 * share)]
        inputs.text, inputs.config = text_of(64).select(rows), ScoreConfig()
        inputs.candidates = [position]
        alone = make_metric("teacher_kl").score(inputs)
        assert raced.importance[position] == pytest.approx(alone.importance[position], rel=1e-4)
        assert raced.stderr[position] == pytest.approx(alone.stderr[position], rel=1e-3)


def test_a_race_goes_to_the_end_where_nothing_is_sure() -> None:
    inputs = text_inputs([1, 3])
    inputs.text = text_of(20)
    full = make_metric("teacher_kl").score(inputs)
    inputs.config = ScoreConfig(decide="teacher_kl", race=RaceConfig(confidence=1 - 1e-15))
    raced = make_metric("teacher_kl").score(inputs)
    assert not raced.dropped
    assert raced.importance == pytest.approx(full.importance) and raced.stderr == pytest.approx(full.stderr)
    inputs.config = ScoreConfig(decide="task_quality", race=RaceConfig(confidence=0.51))
    assert make_metric("teacher_kl").score(inputs).importance == full.importance  # of a shortlist: it does not decide


def test_what_is_surely_worse() -> None:
    # Of the second column, each of four rows of one token is 1 more than the first: no doubt. The third differs by
    # 0, 4, 0, 0: a mean of 1 with a standard error of 1, which is 1.41 of what is left to be seen of half of the rows.
    values = torch.tensor([[0.0, 1.0, 0.0], [1.0, 2.0, 5.0], [2.0, 3.0, 2.0], [3.0, 4.0, 3.0]]).double()
    sums = RowSums(values, torch.ones(4).double())
    assert sums.surely_worse(0.80, share=0.0) == [1, 2]  # Student's t of three degrees of freedom: 0.978
    assert sums.surely_worse(0.81, share=0.0) == [1]  # 1.027
    assert sums.surely_worse(0.87, share=0.5) == [1, 2]  # 1.385, and what is left to be seen makes it 0.98 of 1
    assert sums.surely_worse(0.88, share=0.5) == [1]  # 1.462


@given(st.integers(1, 500), st.floats(0.01, 0.5))
def test_the_stages_of_a_race_have_every_row_once(rows: int, share: float) -> None:
    stages = race_stages(rows, RaceConfig(first_share=share))
    assert sorted(torch.cat(stages).tolist()) == [*range(rows)]
    assert len(stages[0]) >= min(rows, LEAST_ROWS) and all(len(stage) for stage in stages)
    assert [stage.tolist() for stage in race_stages(rows, None)] == [[*range(rows)]]


def test_a_race_that_nothing_runs_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    inputs = text_inputs([1, 2])
    inputs.config = ScoreConfig(decide="block_influence", race=RaceConfig())
    score_candidates(inputs, KeptLayers.full(6))
    assert "score.race: block_influence scores all candidates to the end" in " ".join(capsys.readouterr().err.split())
