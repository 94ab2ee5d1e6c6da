"""Metrics by hand, and the planted answers."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

from layerpeel.config.run import TaskConfig
from layerpeel.config.score import ScoreConfig
from layerpeel.data.rows import Rows
from layerpeel.errors import InputError
from layerpeel.importance.base import ScoringInputs
from layerpeel.importance.metrics import METRICS, make_metric
from layerpeel.importance.scoring import score_layers
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.loading import load_model
from layerpeel.model.surgery import remove_layers
from layerpeel.tasks.evaluation import evaluate
from layerpeel.tasks.registry import make_tasks
from tests.families import tiny_ids, tiny_model, tiny_tokenizer

MASK = torch.tensor([[True] * 17, [True] * 10 + [False] * 7, [True] * 4 + [False] * 13])
PLANTED = {1, 3, 4, 6, 8, 9, 11}


def text_inputs(candidates: list[int]) -> ScoringInputs:
    layerwise = LayerwiseModel(tiny_model("qwen2"))
    return ScoringInputs(layerwise, layerwise, tiny_tokenizer(), candidates, Rows(tiny_ids(), MASK))


def test_teacher_kl_is_the_dense_formula_of_each_shorter_model() -> None:
    inputs = text_inputs([1, 3, 4])
    model = inputs.student.model
    with torch.no_grad():
        teacher = model(tiny_ids()).logits[MASK].double().log_softmax(-1)
        for candidate, importance in make_metric("teacher_kl").score(inputs).importance.items():
            logits = remove_layers(copy.deepcopy(model), [candidate])(tiny_ids()).logits[MASK]
            student = logits.double().log_softmax(-1)
            expected = (teacher.exp() * (teacher - student)).sum(-1).mean().item()
            assert importance == pytest.approx(expected, rel=1e-4)


def test_block_influence_is_one_minus_the_mean_cosine() -> None:
    inputs = text_inputs([1, 2])
    with torch.no_grad():
        hidden = inputs.student.model(tiny_ids(), output_hidden_states=True).hidden_states
    for position, importance in make_metric("block_influence").score(inputs).importance.items():
        a, b = hidden[position][MASK].double(), hidden[position + 1][MASK].double()
        cosines = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
        assert importance == pytest.approx(1 - cosines.mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_scores_just_the_candidates(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "w5 w6 w7 w8"}\n{"text": "w9 w3 w4"}\n')
    inputs = text_inputs([2, 4])
    inputs.tasks = make_tasks([TaskConfig(kind="perplexity", data=str(tmp_path / "text.jsonl"))])
    scores = make_metric(name).score(inputs).importance
    assert set(scores) == {2, 4} and all(math.isfinite(value) for value in scores.values())


def test_a_shortlist_leaves_the_choice_to_the_deciding_metric(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text('{"text": "w5 w6 w7 w8"}\n{"text": "w9 w3 w4"}\n')
    tasks = make_tasks([TaskConfig(kind="perplexity", data=str(tmp_path / "text.jsonl"))])
    config = ScoreConfig(decide="task_quality", shortlist={"by": "teacher_kl", "keep": 2})
    scores = score_layers(tiny_model("llama"), tiny_tokenizer(), config, tasks=tasks, text=Rows(tiny_ids(), MASK))
    assert scores.cheap is not None
    assert set(scores.importance) == set(scores.cheap.ranked()[:2])
    assert scores.cheap_chooses_same == (scores.ranked()[0] == scores.cheap.ranked()[0])


def test_unknown_metrics_are_named() -> None:
    with pytest.raises(InputError, match=r"unknown metric 'task_qualty'; did you mean 'task_quality'\?"):
        make_metric("task_qualty")
    with pytest.raises(InputError, match="cannot be imported"):
        make_metric("no_such_module:Metric")


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["task_quality", "teacher_kl", "repaired_kl"])
def test_the_seven_planted_layers_go_first_and_cost_nothing(kit: Path, metric: str) -> None:
    model, tokenizer = load_model(kit / "models/stories260K-planted12-hf")
    data = str(kit / "eval/stories/stories_en.jsonl")
    tasks = make_tasks([TaskConfig(kind="perplexity", data=data, limit=6)])
    ids = torch.tensor(tokenizer.encode(Path(kit / "text/tinystories_2M.txt").read_text()[:1500])[:256])[None]
    config = ScoreConfig(decide=metric, protect={"first": 1, "last": 0})
    left = list(range(12))
    gone = []
    before = evaluate(model, tokenizer, tasks).scores["perplexity"].value
    for _ in range(7):
        scores = score_layers(model, tokenizer, config, tasks=tasks, text=Rows(ids, torch.ones_like(ids).bool()))
        assert scores.importance[scores.ranked()[0]] == pytest.approx(0, abs=1e-6)
        gone.append(left.pop(scores.ranked()[0]))
        remove_layers(model, [scores.ranked()[0]])
    assert set(gone) == PLANTED
    after = evaluate(model, tokenizer, tasks).scores["perplexity"].value
    assert after == pytest.approx(before, rel=1e-5)
