"""Sums over the rows of a text: means, their standard errors, and which candidates of a race are surely worse.

Shapes: B batch, T tokens, N real tokens of a batch, R rows, M columns, one for each candidate or layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from scipy.special import stdtrit
from torch import Tensor

from layerpeel.config.score import RaceConfig
from layerpeel.importance.base import GROWTH, MetricResult
from layerpeel.processes.distributed import gather

LEAST_ROWS = 8  # from fewer, their variance cannot be estimated


@dataclass(frozen=True)
class RowSums:
    """Sums over the real tokens of each row of a text.

    Attributes:
        values: [R, M] in float64.
        tokens: [R], how many real ones each row has.
    """

    values: Tensor
    tokens: Tensor

    def mean(self) -> list[float]:
        """The M means over all tokens."""
        means: list[float] = (self.values.sum(0) / self.tokens.sum()).tolist()
        return means

    def stderr(self) -> list[float]:
        """Their standard errors, as if rows were drawn independently; of one row, none.

        Those of a ratio of sums over rows (Cochran, Sampling Techniques, 1977, section 6.4).
        """
        rows = len(self.values)
        if rows < 2:
            return []
        around = self.values - self.values.sum(0) / self.tokens.sum() * self.tokens[:, None]
        errors: list[float] = ((around.square().sum(0) * rows / (rows - 1)).sqrt() / self.tokens.sum()).tolist()
        return errors

    def joined(self, *more: RowSums) -> RowSums:
        """These rows, and more of them."""
        parts = [part for part in (self, *more) if len(part.values)]
        return RowSums(torch.cat([part.values for part in parts]), torch.cat([part.tokens for part in parts]))

    def of_all_processes(self) -> RowSums:
        """The rows of each process, after one another; every process has to call it."""
        first, *others = gather(self)
        return first.joined(*others)

    def pick(self, columns: Sequence[int]) -> RowSums:
        """Some of the columns."""
        return RowSums(self.values[:, list(columns)], self.tokens)

    def surely_worse(self, confidence: float, share: float) -> list[int]:
        """The columns whose mean is above the least one by more than chance explains: one-sided, paired row by row.

        Args:
            confidence: for each comparison.
            share: of all rows that these are.
        """
        means = self.mean()
        best = means.index(min(means))
        differences = RowSums(self.values - self.values[:, best : best + 1], self.tokens)
        limit = stdtrit(len(self.values) - 1, confidence) * math.sqrt(1 - share)  # Student's t
        pairs = enumerate(zip(differences.mean(), differences.stderr(), strict=True))
        return [column for column, (gap, error) in pairs if gap > limit * error]

    def result(self, candidates: Sequence[int]) -> MetricResult:
        """The means as importances of the candidates, one each."""
        importance = dict(zip(candidates, self.mean(), strict=True))
        return MetricResult(importance, dict(zip(candidates, self.stderr(), strict=False)))


def by_row(values: Tensor, mask: Tensor) -> Tensor:
    """Sums over each row: [..., B] in float64, of values [..., N] at the real tokens that mask [B, T] has."""
    room = torch.zeros((*values.shape[:-1], *mask.shape), dtype=torch.float64, device=values.device)
    return room.masked_scatter_(mask.to(values.device), values.double()).sum(-1)


def race_stages(rows: int, race: RaceConfig | None) -> list[Tensor]:
    """The indices of rows that are scored from one comparison of a race to the next; without a race, all at once.

    They are drawn without replacement, the same for the same number of rows.
    """
    if not race:
        return [torch.arange(rows)]
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    ends = [0, min(rows, max(math.ceil(race.first_share * rows), LEAST_ROWS))]
    while ends[-1] < rows:
        ends.append(min(rows, math.ceil(GROWTH * ends[-1])))
    return [order[start:end] for start, end in pairwise(ends)]
