"""Racing, worked out by hand; what is named a tie; and planted layers found by the cheap ways, too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch

from layerpeel.config.run import TaskConfig
from layerpeel.config.score import RaceConfig, ScoreConfig
from layerpeel.data.rows import Rows
from layerpeel.importance.base import ScoringInputs
from layerpeel.importance.metrics import make_metric
from layerpeel.importance.scores import LayerScores
from layerpeel.importance.scoring import score_layers
from layerpeel.importance.task_quality import _first, _next
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.inference.requests import LogLikelihood
from layerpeel.model.loading import load_model
from layerpeel.model.surgery import remove_layers
from layerpeel.tasks.base import Sample, Task
from layerpeel.tasks.registry import make_tasks
from layerpeel.tasks.scores import Evaluation, TaskScore
from tests.families import tiny_model, tiny_tokenizer


class Scripted(Task):
    """Says right or wrong by sample and branch; it counts the calls to know which branch asks."""

    right: list[list[float]]  # by branch (the untouched model first), by sample
    asked: list[list[int]] = []  # the samples of each share, by branch
    at: list[int] = []

    def check(self) -> None: ...

    def samples(self, tokenizer: Any) -> list[Sample]:
        return [Sample([LogLikelihood((1,), (5 + index % 50,))], index) for index in range(len(self.right[0]))]

    def score(self, samples: Sequence[Sample], answers: Sequence[Sequence[Any]]) -> TaskScore:
        branch = self.at.pop(0)
        self.asked.append([branch, *(sample.reference for sample in samples)])
        return TaskScore.of_mean([self.right[branch][sample.reference] for sample in samples])


def scripted(right: list[list[float]], branches: list[int]) -> Scripted:
    return Scripted(name="t", kind="scripted", right=right, at=branches)


def race_inputs(task: Task, candidates: list[int], **race: Any) -> ScoringInputs:
    layerwise = LayerwiseModel(tiny_model("llama"))
    config = ScoreConfig(race=RaceConfig(**race))
    return ScoringInputs(layerwise, layerwise, tiny_tokenizer(), candidates, tasks=[task], config=config)


def paired_stderr(a: list[float], b: list[float], share: float = 0.0) -> float:
    """The standard error of the mean difference over n of n / share samples drawn without replacement."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    n, mean = len(differences), sum(differences) / len(differences)
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    return math.sqrt(variance / n * (1 - share))


def test_a_race_begins_with_samples_enough() -> None:
    total = {"large": 200, "small": 40, "tiny": 9}
    assert _first(RaceConfig(first_share=0.125), total) == {"large": 25, "small": 16, "tiny": 9}
    assert _first(RaceConfig(first_share=0.3), total) == {"large": 60, "small": 16, "tiny": 9}
    assert _first(None, total) == total


def test_more_samples_go_where_candidates_differ() -> None:
    """Of two tasks alike in size and cost, one where two candidates agree, one where they differ in every other."""
    n, taken = 400, 40
    same, mixed = [1.0] * n, [float(i % 2) for i in range(n)]
    tasks: list[Task] = [Scripted(name=name, kind="scripted", right=[same]) for name in ("same", "mixed")]
    inputs = race_inputs(tasks[0], [1, 2])
    inputs.tasks = tasks
    one = Evaluation({name: TaskScore.of_mean(same[:taken]) for name in ("same", "mixed")})
    other = Evaluation({"same": one.scores["same"], "mixed": TaskScore.of_mean(mixed[:taken])})
    wanted = _next(inputs, [one, other], {"same": taken, "mixed": taken})
    assert sum(wanted.values()) == 3 * taken and wanted["same"] < 1.2 * taken
    full = _next(inputs, [one, other], {"same": 300, "mixed": 390})
    assert full["mixed"] == n and full["same"] == n  # what is left goes to the other


def test_a_race_drops_what_is_surely_worse_and_says_when() -> None:
    n = 128
    untouched = [1.0] * n
    good = [float(i % 4 != 0) for i in range(n)]
    near = [float(i % 4 != 1) for i in range(n)]  # as good as `good`, on other samples
    bad = [float(i % 8 == 0) for i in range(n)]
    # Branches: the untouched model and three candidates; then those that are left, six times.
    task = scripted([untouched, good, near, bad], [0, 1, 2, 3, *[0, 1, 2] * 6])
    result = make_metric("task_quality").score(race_inputs(task, [1, 2, 4]))
    assert result.dropped == {4: 0.125}
    assert {p: e.scores["t"].n for p, e in result.evaluations.items()} == {1: 128, 2: 128, 4: 16}
    assert result.importance[1] == result.importance[2] == pytest.approx(0.25)
    assert result.stderr[1] == pytest.approx(paired_stderr(untouched, good))
    first = [samples for branch, *samples in task.asked if branch == 0]
    assert [len(samples) for samples in first] == [16, 24, 36, 54, 81, 126, 128]  # by half, in steps of a sixteenth
    assert all(set(one) < set(more) for one, more in pairwise(first)) and set(first[-1]) == set(range(n))
    assert first[0] != list(range(16))  # not just those that a file begins with


@pytest.mark.parametrize("slack", [0.999, 1.001])
def test_a_candidate_drops_out_at_the_limit_that_the_level_sets(slack: float) -> None:
    """The level is set so that the gap after the first share is just above or below what it allows."""
    n = 64
    good, worse = [float(i % 3 != 0) for i in range(n)], [float(i % 2) for i in range(n)]
    probe = scripted([[1.0] * n, good, worse], [0, 1, 2] * 9)
    make_metric("task_quality").score(race_inputs(probe, [1, 2], confidence=0.999999, first_share=0.25))
    first = probe.asked[0][1:]
    a, b = [good[i] for i in first], [worse[i] for i in first]
    gap, error = sum(a) / 16 - sum(b) / 16, paired_stderr(a, b, share=0.25)
    assert gap > 0
    confidence = NormalDist().cdf(slack * gap / error)
    task = scripted([[1.0] * n, good, worse], [0, 1, 2] * 9)
    result = make_metric("task_quality").score(race_inputs(task, [1, 2], confidence=confidence, first_share=0.25))
    assert (result.dropped.get(2) == 0.25) == (slack < 1)


def test_paired_errors_by_hand() -> None:
    a, b = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    one, other = (Evaluation({"t": TaskScore.of_mean(values)}) for values in (a, b))
    assert one.difference_stderr(other, one) == pytest.approx(paired_stderr(a, b))
    assert one.difference_stderr(other, one, seen={"t": 0.5}) == pytest.approx(paired_stderr(a, b, share=0.5))
    assert one.difference_stderr(other, one, seen={"t": 1.0}) == 0
    assert one.difference_stderr(one, one) == 0
    relative = one.difference_stderr(other, one, "relative")
    assert relative == pytest.approx(paired_stderr(a, b) / (4 / 6))
    both = Evaluation({"t": one.scores["t"], "u": other.scores["t"]})
    swapped = Evaluation({"t": other.scores["t"], "u": one.scores["t"]})
    assert both.difference_stderr(swapped, both) == pytest.approx(paired_stderr(a, b) * math.sqrt(2) / 2)


def test_the_order_of_layers_and_ties() -> None:
    scores = LayerScores("task_quality", {1: 0.2, 2: 0.1, 3: 0.1, 5: 0.0}, dropped={5: 0.25})
    assert scores.ranked() == [2, 3, 1, 5]  # what a race gave up is last, whatever it had
    assert scores.tied() == [2, 3]
    healed = replace(scores, healed={1: 0.05, 2: 0.07})
    assert healed.ranked() == [1, 2, 3, 5] and healed.tied() == [1]


def test_shortlist_and_race_find_the_seven_planted_layers_first(kit: Path) -> None:
    model, tokenizer = load_model(kit / "models/stories260K-planted12-hf")
    tasks = make_tasks(
        [
            TaskConfig(kind="pairs", name="grammar", data=str(kit / "eval/zorro/irregular-verb.jsonl"), limit=64),
            TaskConfig(kind="perplexity", data=str(kit / "eval/stories/stories_en.jsonl"), limit=18),
        ]
    )
    ids = torch.tensor(tokenizer.encode(Path(kit / "text/tinystories_2M.txt").read_text()[:1500])[:256])[None]
    config = ScoreConfig(
        protect={"first": 1, "last": 0}, race={"first_share": 0.25}, shortlist={"by": "teacher_kl", "keep": 8}
    )
    left, gone, dropped = list(range(12)), [], 0
    for _ in range(7):
        scores = score_layers(model, tokenizer, config, tasks=tasks, text=Rows(ids, torch.ones_like(ids).bool()))
        assert len(scores.importance) == min(8, len(left) - 1)
        dropped += len(scores.dropped)
        gone.append(left.pop(scores.ranked()[0]))
        remove_layers(model, [scores.ranked()[0]])
    assert set(gone) == {1, 3, 4, 6, 8, 9, 11}
    assert dropped  # the race saved something
