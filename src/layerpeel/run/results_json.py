"""The JSON of scores and trainings: in the journal, in the files of a round, and as the command line prints it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from layerpeel.importance.scores import LayerScores
from layerpeel.tasks.scores import Evaluation, TaskScore
from layerpeel.training.result import TrainingResult

BY_LAYER = ("importance", "stderr", "dropped", "healed")
DERIVED = ("tied", "cheap_chooses_same")  # of the scores, written for people


def evaluation_to_json(evaluation: Evaluation) -> dict[str, Any]:
    """By task: `value`, `stderr`, `n`, `lower_is_better`, `chance` where it is known, and `cut` where prompts were."""
    return {name: _score_to_json(score) for name, score in evaluation.scores.items()}


def evaluation_from_json(value: Any) -> Evaluation:
    if isinstance(value, Evaluation):
        return value
    return Evaluation({name: TaskScore(**score) for name, score in value.items()})


def scores_to_json(scores: LayerScores) -> dict[str, Any]:
    """What a metric, or a shortlist and the deciding metric (`cheap`), said of the layers.

    With a shortlist, `cheap_chooses_same` says whether the cheap metric alone would have chosen the same layer.
    """
    fields: dict[str, Any] = {"metric": scores.metric, "seconds": round(scores.seconds, 3)}
    fields |= {"layer_tokens": scores.layer_tokens, "memory": scores.memory, "memory_halved": scores.memory_halved}
    if scores.from_round:
        fields["from_round"] = scores.from_round
    for name in BY_LAYER:
        if values := getattr(scores, name):
            fields[name] = {str(layer): value for layer, value in sorted(values.items())}
    if len(scores.tied()) > 1:
        fields["tied"] = scores.tied()
    if scores.evaluations:
        by_layer = sorted(scores.evaluations.items())
        fields["evaluations"] = {str(layer): evaluation_to_json(evaluation) for layer, evaluation in by_layer}
    if scores.healed:
        fields["heal_seconds"] = round(scores.heal_seconds, 3)
    if scores.cheap:
        fields |= {"cheap": scores_to_json(scores.cheap), "cheap_chooses_same": scores.cheap_chooses_same}
    return fields


def scores_from_json(value: Any) -> LayerScores:
    if isinstance(value, LayerScores):
        return value
    fields = {name: item for name, item in value.items() if name not in DERIVED}
    for name in BY_LAYER:
        fields[name] = {int(layer): number for layer, number in fields.get(name, {}).items()}
    evaluations = fields.get("evaluations", {})
    fields["evaluations"] = {int(layer): evaluation_from_json(scores) for layer, scores in evaluations.items()}
    if "cheap" in fields:
        fields["cheap"] = scores_from_json(fields["cheap"])
    return LayerScores(**fields)


def _score_to_json(score: TaskScore) -> dict[str, Any]:
    fields = {"value": score.value, "stderr": score.stderr, "n": score.n, "lower_is_better": score.lower_is_better}
    fields |= {} if score.chance is None else {"chance": score.chance}
    return fields | ({"cut": score.cut} if score.cut else {})


def training_to_json(training: TrainingResult) -> dict[str, Any]:
    """The summary of a training, and its `curve`."""
    return asdict(training.summary()) | {"curve": training.curve}


def curve_from_json(value: Mapping[str, Any]) -> list[dict[str, float]]:
    """The curve in what `training_to_json` gave."""
    curve: list[dict[str, float]] = value["curve"]
    return curve
