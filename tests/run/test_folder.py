"""What a run does with a journal, files, a config and a teacher that are not as it left them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from layerpeel.cli.process import main
from layerpeel.config.run import RunConfig
from layerpeel.errors import InputError, RunError
from layerpeel.processes.interrupts import Interrupted
from layerpeel.report.listing import list_runs
from layerpeel.run.events import Back, Changed, Finding, Resume
from layerpeel.run.folder import Run
from layerpeel.run.loop import peel
from layerpeel.run.opening import open_run
from layerpeel.run.writing import OpenRun
from layerpeel.storage.files import sha256_of
from layerpeel.storage.hash_chain import append, checksum, to_line
from tests.faults.__main__ import outcome, tiny_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The config of a finished run, which no test may change."""
    config = tiny_config(tmp_path_factory.mktemp("journal"))
    peel(config)
    return config


@pytest.fixture
def config(finished: RunConfig, tmp_path: Path) -> RunConfig:
    """That of a copy of the run."""
    return finished.model_copy(update={"output": shutil.copytree(finished.output, tmp_path / "run")})


def keep_lines(folder: Path, count: int) -> None:
    """A journal as it was after so many events."""
    journal = folder / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:count]))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_damaged_student_is_written_anew(config: RunConfig, finished: RunConfig) -> None:
    flip(config.output / "student/model.safetensors")
    run = peel(config)
    assert outcome(run.folder) == outcome(finished.output)
    assert [e.damaged for e in run.events if isinstance(e, Back)] == ["student/model.safetensors"]


def test_a_model_card_may_be_edited(config: RunConfig) -> None:
    (config.output / "student/README.md").write_text("my own words")
    assert peel(config).events[-1].event == "finish"
    assert (config.output / "student/README.md").read_text() == "my own words"


def test_a_damaged_round_is_done_again(
    config: RunConfig, finished: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_lines(config.output, 6)  # start, teacher, two rounds
    flip(config.output / "rounds/02/trained.safetensors")
    run = peel(config)
    assert outcome(run.folder) == outcome(finished.output)
    assert "going on from the end of round 1" in " ".join(capsys.readouterr().err.split())
    assert [event.event for event in run.events[6:]] == ["back", "resume", "scored", "round", "finish"]


def test_an_older_round_that_is_damaged_is_named_and_refused_when_it_is_wanted(
    config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(config.output / "rounds/01/trained.safetensors")
    run = peel(config)  # which it does not need
    said = " ".join(capsys.readouterr().err.split())
    assert "trained.safetensors: damaged or gone; that round cannot be exported any more" in said
    assert not any(event.event == "back" for event in run.events)
    with pytest.raises(RunError, match=r"rounds/01/trained\.safetensors: damaged or gone"):
        run.restore(None, 1)  # type: ignore[arg-type]


def test_a_damaged_curve_is_left_out(config: RunConfig) -> None:
    path = config.output / "rounds/01/training.json"
    path.write_text(path.read_text().replace("1", "2"))
    run = Run(config.output)
    assert run.curve(run.rounds[0]) == [] and len(run.curve(run.rounds[1])) == 8


def test_the_copy_of_the_config_is_mended(config: RunConfig) -> None:
    before = sha256_of(config.output / "config.yaml")
    flip(config.output / "config.yaml")
    peel(config)
    assert sha256_of(config.output / "config.yaml") == before


def test_changes_are_shown_and_accepted_where_rounds_still_hold(config: RunConfig) -> None:
    longer = config.model_copy(update={"stop": config.stop.model_copy(update={"target_layers": 3})})
    with pytest.raises(InputError, match=r"stop\.target_layers is 4 there and 3") as error:
        peel(longer)
    assert "--accept-changes" in str(error.value.hint)
    before = Run(config.output).rounds
    run = peel(longer, accept_changes=True)
    assert run.rounds[:2] == before and len(run.rounds) == 3 and run.config.stop.target_layers == 3
    assert "target_layers: 3" in (config.output / "config.yaml").read_text()
    (event,) = [event for event in run.events if isinstance(event, Changed)]
    assert event.changes == ["stop.target_layers is 4 there and 3 in this config"] and event.to == 2


def test_changes_of_what_rounds_were_measured_with_are_refused(config: RunConfig) -> None:
    other = config.model_copy(update={"aggregate": "relative"})
    with pytest.raises(InputError, match="aggregate is 'mean' there and 'relative'") as error:
        peel(other, accept_changes=True)
    assert "--accept-changes" not in str(error.value.hint)


def test_another_teacher_in_the_same_place_is_refused(config: RunConfig, tmp_path: Path) -> None:
    teacher = shutil.copytree(config.teacher, tmp_path / "teacher")
    start = config.model_copy(update={"output": tmp_path / "new", "teacher": str(teacher)})
    with open_run(start):
        pass
    flip(teacher / "model.safetensors")
    with pytest.raises(InputError, match=r"is another than when the run began \(model\.safetensors\)"), open_run(start):
        pass


def test_what_was_found_of_the_teacher_outlives_going_back(config: RunConfig, finished: RunConfig) -> None:
    finding = Finding(check="at_chance", severity="warning", round=None, message="a task", hint="another")
    with open_run(config) as run:
        run.record(finding)
    flip(config.output / "student/model.safetensors")
    run = peel(config)
    assert outcome(run.folder) == outcome(finished.output)
    assert [e.message for e in run.live if isinstance(e, Finding) and e.round is None] == ["a task"]


def test_versions_that_changed_are_said_and_recorded(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keep_lines(config.output, 6)
    monkeypatch.setattr("layerpeel.run.machine.version", lambda name: "99")
    with open_run(config) as run:
        assert isinstance(run.events[-1], Resume) and "torch" in run.events[-1].changed
    assert "-> 99" in capsys.readouterr().err


def test_one_process_at_a_time(config: RunConfig) -> None:
    keep_lines(config.output, 6)
    with (
        open_run(config),
        pytest.raises(InputError, match=f"is being worked on by process {os.getpid()}"),
        open_run(config),
    ):
        pass
    with open_run(config) as run:
        assert run.is_running
    assert not run.is_running


def test_a_folder_that_cannot_be_written_to(config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be a folder: .* is a file"):
        peel(config.model_copy(update={"output": tmp_path / "file" / "run"}))


def test_a_full_disk_is_named(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")

    keep_lines(config.output, 3)
    monkeypatch.setattr("layerpeel.run.writing.write_file", full)
    with pytest.raises(RunError, match=r"no space left on the disk of .*run") as error:
        peel(config)
    assert "run the same command again" in str(error.value.hint)


def test_a_signal_in_training_saves_and_stops(
    config: RunConfig, finished: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(run: OpenRun, point: dict[str, float]) -> None:
        if len(run.rounds) == 1 and "loss" in point:
            os.kill(os.getpid(), signal.SIGTERM)

    keep_lines(config.output, 4)  # after the first round
    journal = config.output / "journal.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(OpenRun, "track", signalled)
        with pytest.raises(Interrupted) as stop:
            peel(config)
    assert stop.value.signal == signal.SIGTERM
    assert json.loads(journal.read_text().splitlines()[-1])["event"] == "scored"
    assert (config.output / "rounds/.training").exists()
    run = peel(config)
    assert outcome(run.folder) == outcome(finished.output)
    assert not (config.output / "rounds/.training").exists()


def first_edition(folder: Path) -> None:
    """Turns a journal into one as the first edition wrote them: no version, and checksums under another name."""
    lines, before = [], ""
    for line in (folder / "journal.jsonl").read_text().splitlines():
        event = {name: value for name, value in json.loads(line).items() if name not in ("version", "checksum")}
        before = checksum(event, before)
        lines.append(to_line(event | {"seal": before}))
    (folder / "journal.jsonl").write_bytes(b"".join(lines))


@pytest.mark.parametrize("change", ["first edition", "no version", "a later version"])
def test_a_run_of_another_version_is_refused_with_what_to_do(
    config: RunConfig, change: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = config.output / "journal.jsonl"
    if change == "first edition":
        first_edition(config.output)
    else:
        start = json.loads(journal.read_text().splitlines()[0])
        del start["version"], start["checksum"]
        start |= {"version": 3} if change == "a later version" else {}
        journal.write_bytes(to_line(start | {"checksum": checksum(start, "")}))
    before = journal.read_bytes()
    with pytest.raises(InputError, match="made by another version of layerpeel") as error:
        peel(config)
    assert "the version that made it" in str(error.value.hint) and "a new output folder" in str(error.value.hint)
    assert journal.read_bytes() == before
    (row,) = list_runs(config.output)
    assert row.state == "damaged" and "made by another version of layerpeel" in row.note
    run_again = ["run", str(config.output / "config.yaml"), "--set", f"output={config.output}"]
    for arguments in (["report", str(config.output)], run_again):
        monkeypatch.setattr("sys.argv", ["layerpeel", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2 and "made by another version of layerpeel" in capsys.readouterr().err


def test_a_line_that_is_no_event_is_refused_with_its_field(config: RunConfig) -> None:
    journal = config.output / "journal.jsonl"
    keep_lines(config.output, 1)
    event = {"event": "back", "time": 0, "to": "nowhere", "damaged": "x"}
    before = json.loads(journal.read_text())["checksum"]
    append(journal, to_line(event | {"checksum": checksum(event, before)}))
    with pytest.raises(RunError, match=r"journal\.jsonl: no event of a run \(back\.to: ") as error:
        peel(config)
    assert error.value.hint
