"""Scores and trainings in JSON: what is written is read back, and what is said for people beside it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

from layerpeel.importance.scores import LayerScores
from layerpeel.run.events import RoundEnd, Scored, event_from_json, event_to_json
from layerpeel.run.results_json import evaluation_from_json, evaluation_to_json, scores_from_json, scores_to_json
from layerpeel.tasks.scores import Evaluation, TaskScore
from layerpeel.training.result import TrainingResult

STUDENT = Evaluation({"a": TaskScore(0.4, 0.1, 5, chance=0.25), "p": TaskScore(8.0, 0.1, 5, lower_is_better=True)})


def test_an_evaluation_is_read_back() -> None:
    assert evaluation_from_json(json.loads(json.dumps(evaluation_to_json(STUDENT)))) == STUDENT


def test_scores_say_which_layers_are_tied_and_which_were_dropped() -> None:
    scores = LayerScores("task_quality", {1: 0.2, 2: 0.1, 3: 0.1, 5: 0.0}, dropped={5: 0.25})
    assert scores_to_json(scores)["tied"] == [2, 3] and scores_to_json(scores)["dropped"] == {"5": 0.25}
    healed = replace(scores, healed={1: 0.05, 2: 0.07})
    assert "tied" not in scores_to_json(healed)


def test_scores_are_read_back() -> None:
    cheap = LayerScores("teacher_kl", {1: 0.2, 2: 0.1, 3: 0.4}, memory=2**20, memory_halved=1)
    scores = LayerScores("task_quality", {1: 0.1, 2: 0.3}, {1: 0.01, 2: 0.02}, {1: STUDENT, 2: STUDENT}, cheap=cheap)
    written = json.loads(json.dumps(scores_to_json(scores)))
    assert written["cheap_chooses_same"] is False and scores_from_json(written) == scores
    healed = replace(scores, healed={1: 0.5}, heal_seconds=1.5, from_round=2)
    assert scores_from_json(json.loads(json.dumps(scores_to_json(healed)))) == healed


def test_events_are_read_back_to_the_last_bit() -> None:
    losses = {"learning_rate": 1e-3, "gradient_norm": 0.1, "tokens": 8, "skipped": 0}
    training = TrainingResult([3], steps=2, curve=[{"loss": 1 / 3, "kl": math.inf, **losses}] * 2)
    quality = {"parameters": 9, "evaluation": STUDENT, "aggregate": math.nan, "kept_quality": 0.1 + 0.2}
    end = RoundEnd(round=1, kept=(0, 2), training=training.summary(), files={"a": "b"}, **quality)
    event = event_from_json(json.loads(json.dumps(event_to_json(end))), "journal")
    assert isinstance(event, RoundEnd) and math.isnan(event.aggregate)
    assert event.model_copy(update={"aggregate": 0.0}) == end.model_copy(update={"aggregate": 0.0})
    scored = Scored(round=1, removed=1, scores=LayerScores("task_quality", {1: 0.1}))
    assert event_from_json(json.loads(json.dumps(event_to_json(scored))), "journal") == scored
