"""What a run remembers of its students in other runtimes, and how its report shows it."""

from __future__ import annotations

import csv
import json
import shlex
from dataclasses import replace
from typing import Any

from layerpeel.report.page import write_report
from layerpeel.report.runtimes import (
    Rates,
    RuntimeSpeed,
    VerifiedRow,
    keep_row,
    runtimes_path,
    student_mark,
    verified_rows,
)
from layerpeel.report.serving import serve_commands
from layerpeel.run.events import Machine
from layerpeel.run.folder import Run
from tests.report.conftest import HOSTILE
from tests.report.test_page import Outline

SPEED = RuntimeSpeed(256, 64, 5, Rates(100.0, 130.0, 1.31), Rates(20.0, 25.0, 1.26))


def row_of(run: Run, number: int = 2, last_pass: bool = False, **changes: Any) -> VerifiedRow:
    row = VerifiedRow(
        runtime="llama.cpp b11434",
        kind="q8_0",
        path="/files/student-q8_0.gguf",
        round=number,
        last_pass=last_pass,
        layers=6 - number,
        teacher_layers=6,
        precision="8-bit",
        right=True,
        mean_kl=0.0048,
        same_top=0.953,
        bytes=1000,
        teacher_bytes=1500,
        speed=SPEED,
        student=student_mark(run, number, last_pass),
        machine=Machine(system="an OS", cores=2),
        time=1.5e9,
    )
    return replace(row, **changes)


def test_rows_are_kept_and_replaced_by_runtime_kind_and_round(run: Run) -> None:
    assert verified_rows(run) == []
    first, other_kind = row_of(run), row_of(run, kind="q4_k_m", bytes=600)
    shallower, last = row_of(run, 1), row_of(run, last_pass=True)
    for row in (first, other_kind, shallower, last):
        keep_row(run, row)
    assert verified_rows(run) == [shallower, first, other_kind, last]
    newer = row_of(run, runtime="llama.cpp b11500", right=False, mean_kl=0.9, speed=None, teacher_bytes=None)
    keep_row(run, newer)
    assert verified_rows(run) == [shallower, newer, other_kind, last]  # of another version, so its speed went, too
    server = row_of(run, runtime="the server at http://127.0.0.1:8000", kind="server")
    assert server.name == server.runtime and newer.name == "llama.cpp"
    assert row_of(run, runtime="OpenVINO 2026.4.1").name == "OpenVINO"


def test_verifying_the_same_file_again_keeps_its_speed(run: Run) -> None:
    keep_row(run, row_of(run))
    keep_row(run, row_of(run, speed=None, teacher_bytes=None, time=1.6e9))
    assert verified_rows(run) == [row_of(run, time=1.6e9)]
    keep_row(run, row_of(run, speed=None, teacher_bytes=None, bytes=999))
    assert verified_rows(run)[0].speed is None


def test_what_was_of_another_student_is_left_out(run: Run) -> None:
    keep_row(run, row_of(run, student="another"))
    keep_row(run, row_of(run, 1, student=student_mark(run, 2, False)))
    keep_row(run, replace(row_of(run), round=3))
    assert verified_rows(run) == []
    marks = {student_mark(run, *which) for which in [(0, False), (1, False), (2, False), (2, True)]}
    assert len(marks) == 4


def test_a_damaged_file_is_as_none(run: Run) -> None:
    keep_row(run, row_of(run))
    path = runtimes_path(run.folder)
    path.write_bytes(path.read_bytes()[:100])
    assert verified_rows(run) == []
    keep_row(run, row_of(run))
    assert verified_rows(run) == [row_of(run)]


def test_the_report_has_a_row_for_each_and_a_figure(run: Run) -> None:
    keep_row(run, row_of(run, last_pass=True))
    keep_row(run, row_of(run, 1, right=False, speed=None, teacher_bytes=None, kind="bf16", precision="16-bit"))
    path = write_report(run, measure=False)
    text = Outline(path.read_text(encoding="utf-8")).text
    for said in ("llama.cpp b11434", "4, last pass", "right, as 8-bit", "WRONG, as 16-bit", "0.0048", "95.3 %"):
        assert said in text
    assert "100.0 → 130.0" in text and "20.0 → 25.0" in text and "machine of other runtimes" in text
    svg = (path.parent / "figures/speed.svg").read_text(encoding="utf-8")
    assert "llama.cpp q8_0" in svg and "by layers alone" in svg and "bf16" not in svg and "PyTorch" not in svg
    with (path.parent / "tables/runtimes.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["layers"], row["right"], row["generation ratio"]) for row in rows] == [
        ("5", "False", ""),
        ("4", "True", "1.26"),
    ]
    assert float(rows[1]["layers ratio"]) == 1.5 and "student" not in rows[0]


def test_pytorchs_speed_stands_beside(run: Run, quick_measuring: None) -> None:
    keep_row(run, row_of(run, 1))
    write_report(run)
    assert "PyTorch, as measured" in (run.folder / "report/figures/speed.svg").read_text(encoding="utf-8")


def test_without_any_it_says_how(run: Run) -> None:
    page = write_report(run, measure=False)
    text = Outline(page.read_text(encoding="utf-8")).text
    assert "Nothing has been verified yet" in text and "--to gguf --quantize q8_0 --speed" in text
    assert json.loads((page.parent / "tables/runtimes.json").read_text()) == []
    assert not (page.parent / "figures/speed.svg").exists()


def test_commands_serve_the_smallest_right_file_of_the_result(run: Run) -> None:
    run = Run(run.folder.rename(run.folder.with_name("a run's")))
    rows = [
        row_of(run, last_pass=True),
        row_of(run, last_pass=True, kind="q4_k_m", bytes=600, path="/my files/q4.gguf", precision="4-bit"),
        row_of(run, last_pass=True, kind="q2_k", bytes=300, right=False),
        row_of(run, 1, bytes=100),
    ]
    commands = [shlex.split(command) for command in serve_commands(run, rows)]
    folder = str(run.folder)
    assert commands[0] == ["vllm", "serve", f"{folder}/student", "--served-model-name", "a run's"]
    assert commands[1][:4] == ["layerpeel", "verify", folder, "--against"] and commands[1][4].endswith(":8000")
    assert commands[2] == ["llama-server", "-m", "/my files/q4.gguf"]
    assert commands[3][4:] == ["http://127.0.0.1:8080", "--precision", "4-bit"]
    (run.student_folder / "config.json").unlink()
    assert serve_commands(run, rows) == []


def test_hostile_names_stay_text(run: Run) -> None:
    keep_row(run, row_of(run, runtime=HOSTILE, kind=HOSTILE, path=f"{HOSTILE}.gguf", last_pass=True))
    keep_row(run, row_of(run, runtime=HOSTILE, machine=Machine(system=HOSTILE)))
    text = write_report(run, measure=False).read_text(encoding="utf-8")
    outline = Outline(text)
    assert [tag for tag, _ in outline.tags].count("script") == 1
    assert not any(tag == "img" or "onerror" in attributes for tag, attributes in outline.tags)
    assert "\u202e" not in text and "\x07" not in text
    assert outline.text.count("document.title='owned'") >= 6
