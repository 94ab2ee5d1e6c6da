"""The paper's importance: how much the aggregate of the tasks drops when a layer is taken out (arXiv 2511.05085)."""

from __future__ import annotations

from layerpeel.importance.base import Metric, ScoringInputs
from layerpeel.tasks.answering import Engine, score_tasks
from layerpeel.tasks.base import Evaluation


class TaskQuality(Metric):
    """The student's aggregate, less its aggregate with the layer skipped."""

    needs = frozenset({"tasks"})

    def score(self, inputs: ScoringInputs) -> dict[int, float]:
        streams = score_tasks(Engine(inputs.student, inputs.tokenizer, inputs.candidates), inputs.tasks)
        whole, *skipped = [Evaluation(scores) for scores in streams]
        reference = inputs.reference or whole
        quality = whole.aggregate(reference, inputs.aggregate)
        inputs.evaluations.update(zip(inputs.candidates, skipped, strict=True))
        return {
            position: quality - evaluation.aggregate(reference, inputs.aggregate)
            for position, evaluation in inputs.evaluations.items()
        }
