"""What comes from models, data and configs is no code, no way out of the run, no control of a terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml

from layerpeel.processes.progress import console, plain, progress, shown
from layerpeel.run.folder import Run
from tests.cli.test_cli import call, fill

HOSTILE = "../../../\x1b[2J\x1b]0;owned\x07[red]\u202eup"


def test_names_from_outside_stay_in_the_run_and_off_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_measuring: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a/b/c"
    folder.mkdir(parents=True)
    fill(folder)
    monkeypatch.chdir(folder)
    config = yaml.safe_load((folder / "run.yaml").read_text())
    rows = [{"prompt": "w5", "target": HOSTILE}, {"prompt": "w6", "target": "w7"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config["tasks"].append({"kind": "generate", "name": HOSTILE, "data": "rows.jsonl", "metric": "copy"})
    config["score"] = {"decide": "task_quality", "tokens": 64}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    before = set(tmp_path.rglob("*"))
    code, out, err = call(monkeypatch, capsys, "run", "run.yaml")
    assert code == 0, err
    code, listed, _ = call(monkeypatch, capsys, "eval", "out/student", "run.yaml", "--set", "stop.target_layers=4")
    assert code == 0
    for text in (out, err, listed):
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert "[red]" in listed and "\\u001b" in listed
    new = set(tmp_path.rglob("*")) - before
    assert new and all(path.is_relative_to(folder / "out") for path in new)
    start = Run(folder / "out").start
    assert start and start.trust_remote_code is False


def test_code_of_a_checkpoint_runs_only_by_the_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    config = json.loads((tmp_path / "teacher/config.json").read_text())
    config |= {"model_type": "their_own", "auto_map": {"AutoConfig": "own.Own"}}
    (tmp_path / "teacher/config.json").write_text(json.dumps(config))
    (tmp_path / "teacher/own.py").write_text(
        f"from transformers import LlamaConfig\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "class Own(LlamaConfig):\n    model_type = 'their_own'\n"
    )
    code, _, err = call(monkeypatch, capsys, "run", "run.yaml")
    assert code == 2 and "trust_remote_code" in err and not (tmp_path / "ran").exists()
    removal = ["remove", "teacher", "--layers", "2", "-o", "shorter"]
    code, _, err = call(monkeypatch, capsys, *removal)
    assert code == 2 and "--trust-remote-code" in err and not (tmp_path / "ran").exists()
    call(monkeypatch, capsys, "run", "run.yaml", "--set", "trust_remote_code=true")
    assert (tmp_path / "ran").exists()  # so that the above would have seen it


def test_what_is_shown_cannot_style_or_steer(capsys: pytest.CaptureFixture[str]) -> None:
    assert plain(HOSTILE) == "../../../\\u001b[2J\\u001b]0;owned\\u0007[red]\\u202eup"
    console.print(shown(HOSTILE), soft_wrap=True)
    assert capsys.readouterr().err == plain(HOSTILE) + "\n"
    with progress(HOSTILE, 1) as advance:
        advance(note=HOSTILE)
    assert "\x07" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("limit", "code", "message"),
    [("1GB", 0, ""), ("50kB", 2, "score.tokens: it takes 0.0 GB of memory or more")],
)
def test_a_limit_of_memory_can_be_set(
    limit: str,
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = ["score", "run.yaml", "--set", f"memory_limit={limit}", "--set", "score.tokens=9000"]
    got, _, err = call(monkeypatch, capsys, *arguments)
    assert got == code and message in err
