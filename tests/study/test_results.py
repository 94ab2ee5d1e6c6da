"""Intervals and rankings by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from layerpeel.errors import InputError
from layerpeel.report.tables import Cell, Table
from layerpeel.run.events import AnyEvent, Scored, TeacherRecord
from layerpeel.run.folder import Run
from layerpeel.study.rankings import Rankings, kendall_tau
from layerpeel.study.results import interval, layer_rows
from layerpeel.study.tables import markdown
from layerpeel.study.writing import run_study
from layerpeel.tasks.scores import Evaluation, TaskScore


def test_an_interval_is_that_of_students_t() -> None:
    assert interval([0.5]) is None
    assert interval([1.0, 3.0]) == pytest.approx(12.706, abs=1e-3)  # s = sqrt(2), s / sqrt(2) = 1
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert interval([2.0, 2.0]) == 0


@pytest.mark.parametrize(
    ("a", "b", "tau"),
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 3], [1, 3, 2], 1 / 3),
        ([1, 1, 2], [1, 2, 3], 2 / math.sqrt(2 * 3)),  # a tie on one side decides nothing
        ([1, 1, 1], [1, 2, 3], None),
    ],
)
def test_kendalls_tau(a: list[float], b: list[float], tau: float | None) -> None:
    assert kendall_tau(a, b) == (None if tau is None else pytest.approx(tau))


def scores(good: float, perplexity: float) -> Evaluation:
    return Evaluation({"choice": TaskScore(good, 0.0, 4), "ppl": TaskScore(perplexity, 0.0, 4, lower_is_better=True)})


def test_rankings_by_hand(base: Path, tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(f"{{base: '{base}', output: '{tmp_path / 'out'}', remove: 1, show: rankings}}\n")
    finished = run_study(study, ["score.shortlist=null", "distill.tokens_per_round=0"])
    assert [row.ranking for row in finished.rows.rankings] == ["choice", "perplexity"]
    run = Run(tmp_path / "out" / "runs" / "base" / "seed-0")
    skipped = {1: scores(0.7, 4.0), 2: scores(0.8, 5.0), 3: scores(0.2, 8.0)}
    rankings = Rankings(with_scores(run, scores(0.8, 4.0), skipped))
    assert rankings.lost(["choice"]) == pytest.approx([0.1, 0.0, 0.6])
    assert rankings.lost(["ppl"]) == pytest.approx([0.0, 0.2, 0.5])  # 1 - 4 / 5, 1 - 4 / 8
    assert rankings.lost(["choice", "ppl"]) == pytest.approx([0.05, 0.1, 0.55])
    taus = rankings.taus()
    assert [row.ranking for row in taus] == list(taus[0].taus) == ["choice", "ppl", "all tasks"]
    third = pytest.approx(1 / 3)
    assert [list(row.taus.values()) for row in taus] == [[1, third, third], [third, 1, 1], [third, 1, 1]]
    choice, ppl = rankings.rows()
    assert (choice.same_first, ppl.same_first) == (0, 1) and choice.first_picks == "2 1 3"
    with pytest.raises(InputError, match="its first scoring ran no tasks"):
        Rankings(with_scores(run, scores(0.8, 4.0), {}))


@pytest.mark.parametrize("show", ["layers", "rankings"])
def test_a_figure_without_scores_leaves_the_tables(
    show: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerpeel.run.peeling.check_size", lambda *_: None)  # which runs of before did not know
    study = tmp_path / "study.yaml"
    study.write_text(f"{{base: '{base}', output: '{tmp_path / 'out'}', show: {show}}}\n")
    with pytest.raises(InputError, match="seed-0: no layer was removed, so there are no scores to show"):
        run_study(study, ["stop={max_params: 1B}"])
    assert (tmp_path / "out" / "results.csv").read_text().splitlines()[1].startswith("base,1,0.0,6.0,")
    assert (tmp_path / "out" / "tables.md").is_file()
    assert run_study(study, ["stop={max_params: 1B}", "show=results"]).rows.results[0].layers == 6


def test_layers_of_a_teacher_that_scores_0(base: Path, tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(f"{{base: '{base}', output: '{tmp_path / 'out'}', remove: 1}}\n")
    run_study(study, ["score.shortlist=null", "distill.tokens_per_round=0"])
    run = Run(tmp_path / "out" / "runs" / "base" / "seed-0")
    assert run.teacher
    run.events = [
        event.model_copy(update={"aggregate": 0.0}) if isinstance(event, TeacherRecord) else event
        for event in run.events
    ]
    with pytest.raises(InputError, match="variant v: its teacher scores 0, and a layer can lose no share of that"):
        layer_rows({"v": [run]})


def with_scores(run: Run, teacher: Evaluation, skipped: dict[int, Evaluation]) -> Run:
    """The run with other task scores of the teacher, and of the candidates of the first scoring."""

    def changed(event: AnyEvent) -> AnyEvent:
        if isinstance(event, TeacherRecord):
            return event.model_copy(update={"evaluation": teacher})
        if isinstance(event, Scored):
            return event.model_copy(update={"scores": replace(event.scores, evaluations=skipped)})
        return event

    run.events = [changed(event) for event in run.events]
    return run


def test_text_in_markdown_is_only_text() -> None:
    table = Table("t", ["variant", "n"], [[Cell("a|b <x> [l](u)", None), Cell("1.5", 1.5)]])
    assert markdown(table).endswith("| a\\|b \\<x\\> \\[l\\](u) | 1.5 |")
