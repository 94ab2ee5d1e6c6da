"""What `layerpeel ls` says of runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from layerpeel.errors import InputError
from layerpeel.report.listing import list_runs
from layerpeel.run.folder import Run
from layerpeel.run.opening import open_run


def test_states(run: Run, tmp_path: Path) -> None:
    lines = run.journal.read_text(encoding="utf-8").splitlines(keepends=True)
    first_round = next(number for number, line in enumerate(lines, start=1) if '"event": "round"' in line)
    (status,) = list_runs(tmp_path)
    assert status.run == str(run.folder)
    assert (status.state, status.note) == ("finished", "the target depth was reached")
    assert (status.rounds, status.teacher_layers, status.layers, status.last_layers) == (2, 6, 4, 4)
    assert status.kept_quality == run.rounds[-1].kept_quality

    run.journal.write_text(
        "".join(lines[:first_round]) + '{"event": "rou', encoding="utf-8"
    )  # torn by a crash, or being written
    (status,) = list_runs(run.folder)
    assert (status.state, status.rounds, status.layers) == ("interrupted", 1, 5)
    assert run.journal.read_text(encoding="utf-8").endswith('{"event": "rou')  # whoever looks changes nothing

    with open_run(run.config.model_copy(update={"output": run.folder})):
        assert list_runs(tmp_path)[0].state == "running"
    assert list_runs(tmp_path)[0].state == "interrupted"

    run.journal.write_text(lines[0], encoding="utf-8")
    assert list_runs(tmp_path)[0].rounds == 0
    run.journal.write_text("{}\n[]\nx\n", encoding="utf-8")
    assert list_runs(tmp_path)[0].state == "damaged"


def test_the_latest_comes_first(finished: Path, tmp_path: Path) -> None:
    for name, age in (("old", 100), ("new", 1), ("middle", 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "journal.jsonl").touch()
        (tmp_path / name / "config.yaml").write_bytes((finished / "config.yaml").read_bytes())
        os.utime(tmp_path / name / "journal.jsonl", (age and 1e9 - age,) * 2)
    assert [Path(row.run).name for row in list_runs(tmp_path)] == ["new", "middle", "old"]
    assert list_runs(tmp_path)[0].last_activity == 1e9 - 1


def test_no_folder(tmp_path: Path) -> None:
    assert list_runs(tmp_path) == []
    with pytest.raises(InputError, match="no such folder"):
        list_runs(tmp_path / "nowhere")
