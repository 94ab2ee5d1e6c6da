"""How far different tasks agree on which layers matter least, from what one scoring found for each candidate."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from layerpeel.errors import InputError
from layerpeel.run.folder import Run
from layerpeel.study.results import pooled
from layerpeel.tasks.scores import Evaluation

Row = dict[str, Any]
ALL = "all tasks"
MOST_SUBSETS = 50  # of each size
FIRST = 3  # picks that are compared


def kendall_tau(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Kendall's tau-b, of which ties are no part (Biometrika 33:239, 1945); None where one side is all ties."""
    signs = [((x > y) - (x < y), (u > v) - (u < v)) for (x, u), (y, v) in combinations(zip(a, b, strict=True), 2)]
    decided = [sum(left != 0 for left, _ in signs), sum(right != 0 for _, right in signs)]
    return sum(left * right for left, right in signs) / math.sqrt(decided[0] * decided[1]) if all(decided) else None


class Rankings:
    """The importance of each candidate of a run's first scoring, by any set of its tasks.

    Raises:
        InputError: the scoring ran no tasks on its candidates.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        found = run.rounds[0]["scores"].get("evaluations") if run.rounds else None
        if not found:
            raise InputError(
                f"{run.folder}: its first scoring ran no tasks, so there are no rankings to compare",
                hint="set score.decide: task_quality",
            )
        self.skipped = {int(layer): Evaluation.from_json(scores) for layer, scores in found.items()}
        self.layers = sorted(self.skipped)
        self.tasks = list(run.reference.scores)

    def lost(self, tasks: Sequence[str]) -> list[float]:
        """What the aggregate of these tasks loses when each candidate is skipped, in the order of `layers`."""
        whole, how = self._only(self.run.reference, tasks), self.run.config.aggregate
        quality = whole.aggregate(whole, how)
        return [quality - self._only(self.skipped[layer], tasks).aggregate(whole, how) for layer in self.layers]

    def first(self, tasks: Sequence[str]) -> list[int]:
        """The layers that would go first; ties go by index."""
        return [layer for _, layer in sorted(zip(self.lost(tasks), self.layers, strict=True))][:FIRST]

    def matrix(self) -> tuple[list[str], list[list[float | None]]]:
        """Names, and tau of each two rankings: by each task alone, and by all of them."""
        losses = {task: self.lost([task]) for task in self.tasks} | {ALL: self.lost(self.tasks)}
        return list(losses), [[kendall_tau(a, b) for b in losses.values()] for a in losses.values()]

    def rows(self, seed: int = 0) -> list[Row]:
        """Each task alone, and random subsets of each size, against all tasks."""
        rows = [self._row(task, [(task,)]) for task in self.tasks]
        for size in range(2, len(self.tasks)):
            subsets = list(combinations(self.tasks, size))
            chosen = random.Random(seed).sample(subsets, min(MOST_SUBSETS, len(subsets)))
            rows.append(self._row(f"{size} of {len(self.tasks)} tasks", chosen))
        return rows

    def _row(self, name: str, subsets: Sequence[Sequence[str]]) -> Row:
        whole, losses = self.first(self.tasks), self.lost(self.tasks)
        firsts = [self.first(subset) for subset in subsets]
        return {
            "ranking": name,
            "subsets": len(subsets),
            "tau": pooled(kendall_tau(self.lost(subset), losses) for subset in subsets),
            "first_picks": " ".join(map(str, firsts[0])) if len(firsts) == 1 else "",
            "same_first": fmean(first[0] == whole[0] for first in firsts),
            "shared_firsts": fmean(len({*first} & {*whole}) / len(whole) for first in firsts),
        }

    @staticmethod
    def _only(evaluation: Evaluation, tasks: Sequence[str]) -> Evaluation:
        return Evaluation({task: evaluation.scores[task] for task in tasks})
