"""What a metric sees when it scores layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layerpeel.config.score import ScoreConfig
from layerpeel.data.rows import Rows, positions_of
from layerpeel.inference.answer_cache import AnswerCache
from layerpeel.inference.budget import Budget
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.processes.interrupts import stop_if_asked
from layerpeel.processes.progress import progress
from layerpeel.tasks.base import Sample, Task
from layerpeel.tasks.scores import Evaluation


@dataclass
class ScoringInputs:
    """The student as it is, and what to judge it by.

    Attributes:
        student: the layers to score.
        teacher: the frozen original; the student itself when a model is scored on its own.
        tokenizer: of both.
        candidates: positions in the student that may be skipped, ascending.
        text: for metrics that read text.
        tasks: for metrics that measure quality.
        reference: the teacher's evaluation on the tasks; None where the student is its own reference.
        aggregate: `mean` or `relative`.
        config: how to score.
        store: answers of a scoring that was interrupted.
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
        """The same with other candidates: what is left of the budget, and samples that have been made, stay."""
        other = copy(self)  # with the cached properties, which dataclasses.replace would leave out
        other.candidates = candidates
        return other

    @cached_property
    def samples(self) -> dict[str, list[Sample]]:
        """Each task's samples, by its name."""
        return {task.name: task.samples(self.tokenizer) for task in self.tasks}

    @cached_property
    def budget(self) -> Budget:
        """Shared by all metrics of a scoring."""
        return Budget(self.config.memory, self.student.device)


@dataclass
class MetricResult:
    """What a metric found, by position.

    Attributes:
        importance: quality lost when the layer is skipped; low goes first.
        stderr: the standard error of each importance, paired sample by sample, where there are samples.
        evaluations: task scores with the layer skipped, where the metric runs tasks.
        dropped: for each candidate that a race gave up, the share of the samples after which it did.
    """

    importance: dict[int, float]
    stderr: dict[int, float] = field(default_factory=dict)
    evaluations: dict[int, Evaluation] = field(default_factory=dict)
    dropped: dict[int, float] = field(default_factory=dict)


class Metric(ABC):
    """Scores layers. `needs` says what it reads: `text`, `tasks`; `skips`, whether it runs the model without each."""

    needs: frozenset[str]
    skips: bool = True

    @abstractmethod
    def score(self, inputs: ScoringInputs) -> MetricResult:
        """Scores each candidate position."""


def _kept(answer_cache: AnswerCache | None, asked: tuple[Any, ...], measure: Callable[[], Tensor]) -> Tensor:
    """What `measure` gives, or gave before the scoring was interrupted."""
    if answer_cache is not None and (found := answer_cache.find_value(*asked)):
        return torch.tensor(found, dtype=torch.float64)
    part = measure().double().cpu()
    if answer_cache is not None:
        answer_cache.keep_value(part.tolist(), *asked)
    return part


def mean_over_text(
    inputs: ScoringInputs, streams: int, measure: Callable[[Tensor, Tensor, Tensor | None], Tensor], description: str
) -> list[float]:
    """The mean over all real tokens of what `measure` sums; processes share the rows.

    Args:
        streams: how many of them `measure` holds at a time.
        measure: gives [M] sums of float64, from token ids [B, T], where real tokens are [B, T], and their positions
            [B, T] if a row holds several documents.

    Returns:
        M means.
    """
    assert inputs.text is not None
    state = PartialState(cpu=inputs.student.device.type == "cpu")
    text = inputs.text
    if positions_of(text.document) is not None and not inputs.student.runs_packed:
        text = text.unpacked()
    own = torch.arange(len(text))[state.process_index :: state.num_processes]
    width, device = text.input_ids.shape[1], inputs.student.device
    total, start = torch.zeros(0, dtype=torch.float64), 0
    with progress(description, len(own)) as advance:
        while start < len(own):
            rows = own[start : start + max(1, inputs.budget.tokens(inputs.student, streams) // width)]
            batch = text.take(rows)
            asked = (description, list(inputs.candidates), *(value.tolist() for value in batch.values()))
            here = {name: value.to(device) for name, value in batch.items()}
            positions = positions_of(here["document"])
            try:
                part = _kept(
                    inputs.answer_cache,
                    asked,
                    lambda: measure(here["input_ids"], here["attention_mask"].bool(), positions),  # noqa: B023
                )
            except Exception as error:
                inputs.budget.shrink(error, inputs.student, streams, width)
                continue
            total = part if not start else total + part
            start += len(rows)
            advance(len(rows))
            stop_if_asked()
    if state.num_processes > 1:
        parts = [torch.tensor(part, dtype=torch.float64) for part in gather_object([total.tolist()]) if part]
        total = torch.stack(parts).sum(0)
    means: list[float] = (total / text.mask.sum()).tolist()
    return means
