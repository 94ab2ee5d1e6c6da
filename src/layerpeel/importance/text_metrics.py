"""Metrics that are means over the real tokens of a text.

`HiddenStateMetric` compares each layer's input with its output; `DistributionMetric` compares next-token distributions
with the teacher's. A metric that needs something else derives from `Metric` and calls `sums_over_text` itself.

Shapes: N real tokens of a batch, B batch, T tokens, R rows of the text, D hidden, V vocabulary, L layers, C candidates.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from layerpeel.data.rows import Rows, positions_of
from layerpeel.errors import InputError
from layerpeel.importance.base import Metric, MetricResult, ScoringInputs
from layerpeel.importance.row_sums import RowSums, by_row, race_stages
from layerpeel.inference.answer_cache import AnswerCache
from layerpeel.inference.finite import NotFiniteError, first_not_finite
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.processes.distributed import processes_of
from layerpeel.processes.interrupts import stop_if_asked
from layerpeel.processes.progress import progress


@dataclass(frozen=True)
class TextBatch:
    """Some rows of the scoring text, on the student's device.

    Attributes:
        input_ids: [B, T].
        mask: [B, T] of bool, True at real tokens.
        positions: [B, T], each token's place in its document; None if no row holds more than one document.
    """

    input_ids: Tensor
    mask: Tensor
    positions: Tensor | None

    @classmethod
    def of(cls, rows: dict[str, Tensor], device: torch.device) -> TextBatch:
        """Takes rows as `Rows.take` gives them."""
        input_ids, mask, document = (rows[name].to(device) for name in ("input_ids", "attention_mask", "document"))
        return cls(input_ids, mask.bool(), positions_of(document))

    def final_hidden(
        self,
        layerwise: LayerwiseModel,
        candidates: Sequence[int] = (),
        hook: Callable[[int, Tensor, Tensor], None] | None = None,
        tokens_per_call: int | None = None,
    ) -> Tensor:
        """Final hidden states at real tokens, of the model as it is and with each candidate skipped: [1 + C, N, D].

        Args:
            hook, tokens_per_call: as in `LayerwiseModel.forward_with_skips`.
        """
        hidden = layerwise.forward_with_skips(
            self.input_ids, candidates, hook=hook, positions=self.positions, tokens_per_call=tokens_per_call
        )
        return hidden[:, self.mask]


class HiddenStateMetric(Metric):
    """A function of each layer's input and output, mean over real tokens; no layer is skipped for it."""

    needs = frozenset({"text"})
    skips = False

    @abstractmethod
    def measure(self, before: Tensor, after: Tensor) -> Tensor:
        """How much a layer changes the hidden state of each token.

        Args:
            before, after: [N, D] in fp32, the layer's input and output at real tokens.

        Returns:
            [N].
        """

    def score(self, inputs: ScoringInputs) -> MetricResult:
        def sums(batch: TextBatch) -> Tensor:
            by_layer = torch.zeros(len(batch.mask), len(inputs.student.layers), dtype=torch.float64)

            def hook(position: int, before: Tensor, after: Tensor) -> None:
                changes = self.measure(before[batch.mask].float(), after[batch.mask].float())
                by_layer[:, position] = by_row(changes, batch.mask).cpu()

            batch.final_hidden(inputs.student, hook=hook, tokens_per_call=inputs.budget.tokens_per_call)
            return by_layer[:, list(inputs.candidates)]

        return sums_over_text(self, inputs, sums, rows_of(inputs), inputs.candidates).result(inputs.candidates)


class DistributionMetric(Metric):
    """A distance of next-token distributions from the teacher's, mean over real tokens.

    A layer's importance is the distance with the layer skipped, less the distance of the student as it is. In a race,
    candidates that are surely worse than the best drop out after a share of the rows, as in `TaskQuality`.
    """

    needs = frozenset({"text"})
    races = True

    @abstractmethod
    def measure(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The distance at each token.

        Args:
            student, teacher: [N, V] log-probabilities in fp32; not to be changed.

        Returns:
            [N].
        """

    @torch.no_grad()
    def score(self, inputs: ScoringInputs) -> MetricResult:
        text, alive, result = rows_of(inputs), list(inputs.candidates), MetricResult({})
        race = inputs.config.race if inputs.config.decide == self.name else None
        sums, taken = None, 0
        for rows in race_stages(len(text), race):
            more = self._added(inputs, alive, text.select(rows) if race else text)
            sums, taken = sums.joined(more) if sums else more, taken + len(rows)
            so_far = sums.result(alive)
            result.importance |= so_far.importance
            result.stderr |= so_far.stderr
            if not race or taken == len(text):
                break
            worse = sums.surely_worse(race.confidence, taken / len(text))
            result.dropped |= {alive[column]: taken / len(text) for column in worse}
            left = [column for column in range(len(alive)) if column not in worse]
            alive, sums = [alive[column] for column in left], sums.pick(left)
            if len(alive) == 1:
                break
        return result

    def _added(self, inputs: ScoringInputs, candidates: Sequence[int], text: Rows) -> RowSums:
        """What skipping each candidate adds to the distance, summed over each row."""

        def sums(batch: TextBatch) -> Tensor:
            branches = batch.final_hidden(inputs.student, candidates, tokens_per_call=inputs.budget.tokens_per_call)
            alone = inputs.teacher is inputs.student
            teacher = branches[0] if alone else batch.final_hidden(inputs.teacher)[0]
            return by_row(self.distances(inputs, branches, teacher), batch.mask).T

        of_branches = sums_over_text(self, inputs, sums, text, candidates, branches=1 + len(candidates))
        return RowSums(of_branches.values[:, 1:] - of_branches.values[:, :1], of_branches.tokens)

    def distances(self, inputs: ScoringInputs, branches: Tensor, teacher: Tensor) -> Tensor:
        """At each of N tokens, of hidden states [1 + C, N, D] against the teacher's [N, D]: [1 + C, N] in fp32."""
        distances = torch.empty(branches.shape[:2], device=branches.device)
        rows = inputs.budget.logit_rows(inputs.teacher, branches=3)
        for start in range(0, len(teacher), rows):
            target = inputs.teacher.logits(teacher[start : start + rows]).float().log_softmax(-1)
            for branch, hidden in enumerate(branches[:, start : start + rows]):
                log_probs = inputs.student.logits(hidden).float().log_softmax(-1)
                measured = self.measure(log_probs, target)
                if measured.shape != target.shape[:1]:
                    raise InputError(
                        f"{self.name}: `measure` gives {list(measured.shape)}, expected a number for each token, "
                        f"{list(target.shape[:1])}",
                        hint="leave out the sum or mean over tokens",
                    )
                distances[branch, start : start + rows] = measured
        return distances


def rows_of(inputs: ScoringInputs) -> Rows:
    """The text, one document a row where the student could not keep them apart."""
    assert inputs.text is not None
    if positions_of(inputs.text.document) is not None and not inputs.student.runs_packed:
        return inputs.text.unpacked()
    return inputs.text


def sums_over_text(
    metric: Metric,
    inputs: ScoringInputs,
    sums: Callable[[TextBatch], Tensor],
    text: Rows,
    candidates: Sequence[int],
    branches: int = 1,
) -> RowSums:
    """What `sums` adds up over the real tokens of each row of a text; processes share the rows.

    Args:
        metric: whose sums these are: shown in the progress bar, and part of the key in the answer cache.
        sums: gives [B, M] sums over the real tokens of each row of a batch.
        text: of the inputs, or some rows of it; see `rows_of`.
        candidates: that the sums are about, part of that key, too.
        branches: copies of the batch that go through a layer together, to which batches are sized.
    """
    state = processes_of(inputs.student.device)
    indices = torch.arange(len(text))[state.process_index :: state.num_processes]
    values = _of_rows(metric, inputs, text, indices, sums, candidates, branches)
    return RowSums(values, text.mask[indices].sum(1).double()).of_all_processes()


def _of_rows(
    metric: Metric,
    inputs: ScoringInputs,
    text: Rows,
    indices: Tensor,
    sums: Callable[[TextBatch], Tensor],
    candidates: Sequence[int],
    branches: int,
) -> Tensor:
    """What `sums` gives for the rows at `indices`, [rows, M], in batches that fit the memory budget."""
    width, question = text.input_ids.shape[1], (type(metric).__module__, type(metric).__qualname__, "by row")
    parts, start = [torch.zeros(0, 0, dtype=torch.float64)], 0
    with progress(f"scoring by {metric.name}", len(indices)) as advance:
        while start < len(indices):
            batch_indices = indices[start : start + max(1, inputs.budget.tokens(inputs.student, branches) // width)]
            rows = text.take(batch_indices)
            key = (*question, list(candidates), *(ids.tolist() for ids in rows.values()))
            batch = TextBatch.of(rows, inputs.student.device)
            try:
                part = _cached(inputs.answer_cache, key, partial(sums, batch))
            except Exception as error:
                inputs.budget.shrink(error, inputs.student, branches, width)
                continue
            if not torch.isfinite(part).all():
                first = int(batch_indices[0])
                place = first_not_finite(inputs.student, rows["input_ids"][0].tolist())
                raise NotFiniteError(
                    f"scoring by {metric.name}: NaN or infinity in rows {first} to {first + len(batch_indices) - 1} of "
                    f"the text; the model first gives it in {place}"
                )
            parts.append(part)
            start += len(batch_indices)
            advance(len(batch_indices))
            stop_if_asked()
    return torch.cat(parts[1:] or parts)


def _cached(answer_cache: AnswerCache | None, key: tuple[Any, ...], compute: Callable[[], Tensor]) -> Tensor:
    """The sums kept under `key` by a scoring that was interrupted, or else computed, and kept."""
    if answer_cache is not None and (values := answer_cache.find_value(*key)):
        return torch.tensor(values, dtype=torch.float64)
    sums = compute().double().cpu()
    if answer_cache is not None:
        answer_cache.keep_value(sums.tolist(), *key)
    return sums
