"""Base class of metrics, what a metric is given, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from layerpeel.config.score import ScoreConfig
from layerpeel.data.rows import Rows
from layerpeel.inference.answer_cache import AnswerCache
from layerpeel.inference.budget import Budget
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.tasks.base import Sample, Task
from layerpeel.tasks.scores import Evaluation

GROWTH = 1.5  # of the tokens, from one comparison in a race to the next


@dataclass
class ScoringInputs:
    """The student whose layers are scored, and the text or tasks to score them on.

    Attributes:
        student: the layers to score.
        teacher: the frozen original; the student itself when a model is scored on its own.
        tokenizer: of both.
        candidates: positions in the student that may be skipped, ascending.
        text: for metrics that read text.
        tasks: for metrics that run tasks.
        reference: the teacher's evaluation on the tasks; None where the student is its own reference.
        aggregate: `mean` or `relative`.
        config: how to score.
        answer_cache: answers of a scoring that was interrupted.
    """

    student: LayerwiseModel
    teacher: LayerwiseModel
    tokenizer: PreTrainedTokenizerBase
    candidates: Sequence[int]
    text: Rows | None = None
    tasks: Sequence[Task] = ()
    reference: Evaluation | None = None
    aggregate: str = "mean"
    config: ScoreConfig = field(default_factory=ScoreConfig)
    answer_cache: AnswerCache | None = None

    def among(self, candidates: Sequence[int]) -> ScoringInputs:
        """The same inputs with other candidates; they share the budget and the samples already built."""
        other = copy(self)  # unlike dataclasses.replace, keeps the cached properties
        other.candidates = candidates
        return other

    @cached_property
    def samples(self) -> dict[str, list[Sample]]:
        """The samples of each task, by task name."""
        return {task.name: task.samples(self.tokenizer) for task in self.tasks}

    @cached_property
    def budget(self) -> Budget:
        """The memory budget, shared by all metrics of a scoring."""
        return Budget(self.config.memory, self.student.device)


@dataclass
class MetricResult:
    """A metric's scores, by position in the student.

    Attributes:
        importance: quality lost when the layer is skipped; the lowest goes first.
        stderr: the standard error of each importance, paired sample by sample, or row by row of the text.
        evaluations: task scores with the layer skipped, where the metric runs tasks.
        dropped: for each candidate that a race dropped, the share of the samples, or rows, after which it did.
    """

    importance: dict[int, float]
    stderr: dict[int, float] = field(default_factory=dict)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    dropped: dict[int, float] = field(default_factory=dict)


class Metric(ABC):
    """Scores layers.

    Most metrics derive from `HiddenStateMetric` or `DistributionMetric` (`importance/text_metrics.py`), which do all
    but the formula.

    Attributes:
        needs: what the metric reads of its inputs: `text`, `tasks`, or both.
        skips: whether it runs the model with each candidate skipped, for estimates of time and memory.
        races: whether `score.race` has a meaning for it.
        runs_besides: layer calls for each candidate besides those of the layers after it, for estimates.
        name: as the config names it, for progress bars; set by `make_metric`.
    """

    needs: frozenset[str]
    skips: bool = True
    races: bool = False
    runs_besides: int = 0
    name: str = "a metric"

    @abstractmethod
    def score(self, inputs: ScoringInputs) -> MetricResult:
        """Scores exactly the positions in `inputs.candidates`."""
