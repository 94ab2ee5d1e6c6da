"""What a metric sees when it scores layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layerpeel.stack import Stack
from layerpeel.tasks import Task
from layerpeel.tasks.base import Evaluation


@dataclass
class ScoringInputs:
    """The student as it is, and what to judge it by.

    Attributes:
        student: the layers to score.
        teacher: the frozen original; the student itself when a model is scored on its own.
        tokenizer: of both.
        candidates: positions in the student that may be skipped, ascending.
        batches: token ids, [B, T] each with its mask [B, T], for metrics that read text.
        tasks: for metrics that measure quality.
        reference: the teacher's evaluation on the tasks; None where the student is its own reference.
        aggregate: `mean` or `relative`.
        evaluations: what the tasks gave for each candidate, filled in by a metric that runs them.
    """

    student: Stack
    teacher: Stack
    tokenizer: PreTrainedTokenizerBase
    candidates: Sequence[int]
    batches: Sequence[tuple[Tensor, Tensor]] = ()
    tasks: Sequence[Task] = ()
    reference: Evaluation | None = None
    aggregate: str = "mean"
    evaluations: dict[int, Evaluation] = field(default_factory=dict)


class Metric(ABC):
    """Scores layers. `needs` says what it reads: `text`, `tasks`."""

    needs: frozenset[str]

    @abstractmethod
    def score(self, inputs: ScoringInputs) -> dict[int, float]:
        """The importance of each candidate position: quality lost when it is skipped; low goes first."""
