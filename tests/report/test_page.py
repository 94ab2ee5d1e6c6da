"""The report: its values are the journal's, and what comes from outside stays text."""

from __future__ import annotations

import csv
import json
import math
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from layerpeel.report import page as page_module
from layerpeel.report.gather import depth_rows, names_of
from layerpeel.report.page import watch, write_report
from layerpeel.report.rows import ImportanceRow
from layerpeel.run.events import Finding
from layerpeel.run.folder import Run
from layerpeel.tasks.scores import Evaluation, TaskScore
from tests.report.conftest import HOSTILE

VOID = {"meta", "link", "img", "wbr", "br", "input"}


class Outline(HTMLParser):
    """The tags of a page, checked to nest, and the text of some."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return json.loads((folder / "tables" / f"{name}.json").read_text(encoding="utf-8"))


def test_tables_hold_the_journals_values(run: Run) -> None:
    write_report(run, measure=False)
    folder = run.folder / "report"
    depths = rows_of(folder, "depths")
    assert run.teacher and run.last_pass
    students = [run.teacher, *(each.end for each in run.rounds), run.last_pass]
    assert [row["layers"] for row in depths] == [6, 5, 4, 4]
    assert [row["parameters"] for row in depths] == [student.parameters for student in students]
    assert [row["kept_quality"] for row in depths] == [student.kept_quality for student in students]
    assert [row["=ppl"] for row in depths] == [student.evaluation.scores["=ppl"].value for student in students]
    importance = rows_of(folder, "importance")
    assert {(row["role"], row["metric"]) for row in importance} == {
        ("decides", "block_influence"),
        ("shortlist", "teacher_kl"),
    }
    for each in run.rounds:
        rows = [row for row in importance if row["round"] == each.number]
        deciding = {row["layer"]: row["importance"] for row in rows if row["role"] == "decides"}
        assert deciding == each.scores.importance
        assert {row["layer"] for row in rows if row["removed"]} == {each.removed}
    costs = rows_of(folder, "costs")
    lost = sum(row["aggregate_lost"] for row in costs)
    assert lost == pytest.approx(students[0].aggregate - students[2].aggregate)  # the last pass is no round
    with (folder / "tables/depths.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.reader(file))
    assert "'=ppl" in table[0] and HOSTILE in table[0]  # no formula in a spreadsheet, and nothing lost
    assert [float(line[table[0].index("aggregate")]) for line in table[1:]] == [
        student.aggregate for student in students
    ]


def test_sizes_on_disk_are_those_of_the_files(run: Run) -> None:
    last = depth_rows(run)[-1]
    assert last.bytes == sum(file.stat().st_size for file in run.student_folder.glob("*.safetensors"))
    shutil.rmtree(run.student_folder)
    assert depth_rows(run)[-1].bytes == 4 * last.parameters  # by the teacher's dtype, without headers


def test_the_aggregates_error_is_that_of_its_tasks() -> None:
    reference = Evaluation({"a": TaskScore(0.8, 0.1, 9), "p": TaskScore(4.0, 0.2, 9, lower_is_better=True)})
    student = Evaluation({"a": TaskScore(0.6, 0.03, 9), "p": TaskScore(5.0, 0.5, 9, lower_is_better=True)})
    # quality of p is 4 / 5, and falls by 4 / 25 for each unit of perplexity
    assert student.aggregate_stderr(reference, "mean") == pytest.approx(math.hypot(0.03, 0.5 * 4 / 25) / 2)
    assert student.aggregate_stderr(reference, "relative") == pytest.approx(math.hypot(0.03 / 0.8, 0.5 * 4 / 25) / 2)


def test_the_page_is_whole_and_loads_nothing(run: Run) -> None:
    path = write_report(run, measure=False)
    text = path.read_text(encoding="utf-8")
    outline = Outline(text)
    for tag, attributes in outline.tags:
        for key in ("src", "href", "xlink:href"):
            value = attributes.get(key) or "#"
            assert value.startswith(("#", "data:")) or (path.parent / value).is_file(), (tag, value)
    assert 'http-equiv="refresh"' not in text and "@import" not in text and "url(http" not in text
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert sum(tag == "svg" for tag, _ in outline.tags) == 6
    assert sum(tag == "table" for tag, _ in outline.tags) == sum(tag == "caption" for tag, _ in outline.tags)
    assert "6 → 4 layers with" in outline.text and "were not measured" in outline.text
    for name in ("quality", "tasks", "importance", "importance-shortlist", "costs", "training"):
        assert (path.parent / f"figures/{name}.png").read_bytes()[:4] == b"\x89PNG"
        drawing = ElementTree.parse(path.parent / f"figures/{name}.svg")
        assert any(element.tag.endswith("}text") for element in drawing.iter())


def test_hostile_strings_stay_text(run: Run) -> None:
    run.events.append(Finding(check=HOSTILE, severity="warning", message=HOSTILE, hint=HOSTILE, round=2))
    (run.folder / "report").mkdir(exist_ok=True)
    samples = [{"source": HOSTILE, "prompt": HOSTILE, "texts": dict.fromkeys("012", HOSTILE)}]
    speed = {"ms_per_token": 1.0, "ms_per_token_least": 0.5, "ms_per_token_most": 9.0, "tokens_per_second": 2.0}
    speed["peak_memory"] = 3
    (run.folder / "report/measurements.json").write_text(
        json.dumps(
            {
                "depths": dict.fromkeys("012", speed),
                "samples": samples,
                "machine": {"system": HOSTILE},
                "setup": {
                    "prompt_tokens": 1,
                    "new_tokens": 1,
                    "batch": 1,
                    "repeats": 1,
                    "device": HOSTILE,
                    "dtype": "x",
                },
            }
        )
    )
    text = write_report(run).read_text(encoding="utf-8")
    outline = Outline(text)
    assert [tag for tag, _ in outline.tags].count("script") == 1
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in outline.tags)
    assert "\u202e" not in text and "\x07" not in text
    assert outline.text.count("document.title='owned'") >= 8  # in tables, figures, findings, samples, and the config


def test_a_run_can_be_compared_with_others_and_written_elsewhere(run: Run, finished: Path, tmp_path: Path) -> None:
    other = Run(shutil.copytree(finished, tmp_path / "other"))
    write_report(run, [other], tmp_path / "both", measure=False)
    names = names_of([run, other])
    assert names == ["run", "other"] and {row["run"] for row in rows_of(tmp_path / "both", "quality")} == set(names)
    assert names_of([run, Run(finished)]) == [f"{tmp_path.name}/run", f"{finished.parent.name}/run"]
    svg = (tmp_path / "both/figures/quality.svg").read_text(encoding="utf-8")
    assert all(f"{name} (block_influence, repair, 128 tokens a round)" in svg for name in names)
    assert not (run.folder / "report").exists()


def test_a_run_at_its_beginning_has_a_page(run: Run) -> None:
    lines = run.journal.read_text(encoding="utf-8").splitlines(keepends=True)
    run.journal.write_text(lines[0], encoding="utf-8")
    assert "Nothing to report yet" in write_report(Run(run.folder)).read_text(encoding="utf-8")
    run.journal.write_text("".join(lines[:2]), encoding="utf-8")
    assert "6 → 6 layers" in write_report(Run(run.folder), measure=False).read_text(encoding="utf-8")


@pytest.mark.slow
def test_watching_ends_with_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run.journal.read_text(encoding="utf-8").splitlines(keepends=True)
    run.journal.write_text("".join(lines[:4]), encoding="utf-8")
    pages = []

    def next_line(_: float) -> None:
        pages.append((run.folder / "report/index.html").read_text(encoding="utf-8"))
        written = len(run.journal.read_text(encoding="utf-8").splitlines())
        with run.journal.open("a", encoding="utf-8") as journal:
            journal.write(lines[written])

    monkeypatch.setattr(page_module.time, "sleep", next_line)
    page = watch(Run(run.folder)).read_text(encoding="utf-8")
    assert len(pages) == len(lines) - 4
    assert all('http-equiv="refresh"' in each for each in pages) and "refresh" not in page.split("<style>")[0]
    assert "Interrupted" in pages[0] and "so far" in pages[0] and "Finished" in page


@pytest.mark.parametrize("count", [1, 36])
def test_figures_hold_runs_of_any_length(run: Run, tmp_path: Path, count: int) -> None:
    """No warning of matplotlib's, which would be an error here."""
    from layerpeel.report import figures, style

    rows = [
        ImportanceRow(number, layer, "metric", "decides", 0.0, None, None, removed=False)
        for number in range(1, count + 1)
        for layer in range(number, 40)
    ]
    for figure in (
        figures.draw_heat(rows, list(range(1, count + 1)), 40, "metric"),
        figures.draw_training({n: [{"loss": 0.0, "tokens": 1.0}] for n in range(1, count + 1)}),
        figures.draw_quality([figures.Line("中", "a $method$", [0], [float("nan")], [0.0], [1])], "aggregate", 0.5),
    ):
        assert style.save(figure, tmp_path / "figure").startswith("<svg")
