"""How far the rankings of layers by different tasks agree, from the task scores of one scoring's candidates."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean

from layerpeel.errors import InputError
from layerpeel.run.folder import Run
from layerpeel.study.results import first_scoring, mean_or_none
from layerpeel.study.rows import RankingRow, TauRow
from layerpeel.tasks.scores import Evaluation

ALL = "all tasks"
MOST_SUBSETS = 50  # of each size
FIRST = 3  # picks that are compared


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Kendall's tau-b, which leaves out ties (Biometrika 33:239, 1945); None where one side is all ties."""
    signs = [((x > y) - (x < y), (u > v) - (u < v)) for (x, u), (y, v) in combinations(zip(a, b, strict=True), 2)]
    decided = [sum(left != 0 for left, _ in signs), sum(right != 0 for _, right in signs)]
    return sum(left * right for left, right in signs) / math.sqrt(decided[0] * decided[1]) if all(decided) else None


class Rankings:
    """The importance of each candidate of a run's first scoring, by any set of its tasks.

    Attributes:
        run: the run.
        skipped: the task scores with each candidate skipped, by teacher layer.
        layers: the candidates, ascending.
        tasks: names of the run's tasks.

    Raises:
        InputError: nothing was scored, or the scoring ran no tasks on its candidates.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.skipped = first_scoring(run).evaluations
        if not self.skipped:
            raise InputError(
                f"{run.folder}: its first scoring ran no tasks, so there are no rankings to compare",
                hint="set score.decide: task_quality",
            )
        self.layers = sorted(self.skipped)
        self.tasks = list(run.reference.scores)

    def lost(self, tasks: Sequence[str]) -> list[float]:
        """What the aggregate of these tasks loses when each candidate is skipped, in the order of `layers`."""
        reference, how = self._only(self.run.reference, tasks), self.run.config.aggregate
        aggregate = reference.aggregate(reference, how)
        return [aggregate - self._only(self.skipped[layer], tasks).aggregate(reference, how) for layer in self.layers]

    def first(self, tasks: Sequence[str]) -> list[int]:
        """The first layers of the ranking; ties go by index."""
        return [layer for _, layer in sorted(zip(self.lost(tasks), self.layers, strict=True))][:FIRST]

    def taus(self) -> list[TauRow]:
        """Tau of each two rankings: by each task alone, and by all of them."""
        losses = {task: self.lost([task]) for task in self.tasks} | {ALL: self.lost(self.tasks)}
        return [
            TauRow(name, {other: kendall_tau(lost, losses[other]) for other in losses}) for name, lost in losses.items()
        ]

    def rows(self, seed: int = 0) -> list[RankingRow]:
        """Each task alone, and random subsets of each size, against all tasks."""
        rows = [self._row(task, [(task,)]) for task in self.tasks]
        for size in range(2, len(self.tasks)):
            subsets = list(combinations(self.tasks, size))
            chosen = random.Random(seed).sample(subsets, min(MOST_SUBSETS, len(subsets)))
            rows.append(self._row(f"{size} of {len(self.tasks)} tasks", chosen))
        return rows

    def _row(self, name: str, subsets: Sequence[Sequence[str]]) -> RankingRow:
        reference, losses = self.first(self.tasks), self.lost(self.tasks)
        firsts = [self.first(subset) for subset in subsets]
        return RankingRow(
            ranking=name,
            subsets=len(subsets),
            tau=mean_or_none(kendall_tau(self.lost(subset), losses) for subset in subsets),
            first_picks=" ".join(map(str, firsts[0])) if len(firsts) == 1 else "",
            same_first=fmean(first[0] == reference[0] for first in firsts),
            shared_firsts=fmean(len({*first} & {*reference}) / len(reference) for first in firsts),
        )

    @staticmethod
    def _only(evaluation: Evaluation, tasks: Sequence[str]) -> Evaluation:
        return Evaluation({task: evaluation.scores[task] for task in tasks})
