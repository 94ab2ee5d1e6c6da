"""The command line as a user meets it: what it prints where, exit codes, and a message for every mistake."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

from layerpeel.cli.process import main
from layerpeel.config.reading import load_config
from layerpeel.config.run import RunConfig
from layerpeel.errors import RunError
from layerpeel.inference.ridge import Regression
from layerpeel.model.loading import load_model
from layerpeel.plan.speed import Speed
from layerpeel.run.loop import peel
from layerpeel.training.optimizers import ScheduledOptimizers
from layerpeel.training.rounds import repair
from tests.families import save_tiny, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_measuring: None) -> Path:
    """A working folder with a teacher, text, tasks and `run.yaml`."""
    monkeypatch.chdir(tmp_path)
    return fill(tmp_path)


def fill(folder: Path) -> Path:
    """Puts a teacher, text, tasks and `run.yaml` into a folder."""
    save_tiny(folder / "teacher")
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join("w5 w9 w7 w8 w4 w6 " * 12 for _ in range(12)))
    rows = [{"context": "w5 w9", "choices": ["w7", "w8"], "answer": 0}] * 4
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "teacher": "teacher",
        "output": "out",
        "stop": {"target_layers": 5},
        "score": {"decide": "teacher_kl", "tokens": 64},
        "tasks": [{"kind": "choice", "data": "choice.jsonl"}],
        "distill": {"text": "text.txt", "tokens_per_round": 128, "tokens_per_step": 32, "sequence_length": 16},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


def without_stop(folder: Path) -> str:
    """`run.yaml` as one writes it that will not run."""
    fields = yaml.safe_load((folder / "run.yaml").read_text())
    return yaml.safe_dump({name: value for name, value in fields.items() if name != "stop"})


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Runs the command; gives its exit code and what it wrote."""
    monkeypatch.setattr(sys, "argv", ["layerpeel", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main()
    output = capsys.readouterr()
    return int(stopped.value.code or 0), output.out, output.err


@pytest.mark.slow
def test_run_score_eval_remove_distill(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ok(*arguments: str) -> str:
        code, out, err = call(monkeypatch, capsys, *arguments)
        assert code == 0, err
        return out

    table = ok("run", "run.yaml")
    assert "removed" in table and "out/student" in table
    said = json.loads(ok("run", "run.yaml", "--json"))  # finished: nothing is done again
    assert len(said["rounds"]) == 1 and said["finish"]["reason"] == "target_layers"
    scores = json.loads(ok("score", "run.yaml", "--json"))
    assert scores["importance"] == said["rounds"][0]["scores"]["importance"]
    evaluation = json.loads(ok("eval", "out/student", "run.yaml", "--json"))
    assert evaluation == said["rounds"][0]["evaluation"]
    assert "4 layers" in ok("remove", "teacher", "--layers", "1,3", "-o", "short")
    assert "4 layers, loss" in ok("distill", "run.yaml", "--layers", "1-2", "-o", "healed")
    assert ok("score", "run.yaml").count("\n") >= 5 and ok("eval", "teacher", "run.yaml").count("choice") == 1


@pytest.mark.parametrize(
    ("weights", "number"), [("memory", signal.SIGINT), ("stream", signal.SIGTERM)], ids=["memory", "stream"]
)
def test_a_distillation_goes_on_where_it_was_stopped(
    weights: str, number: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, made = ScheduledOptimizers.step, [0]

    def interrupted(optimizers: ScheduledOptimizers) -> None:
        step(optimizers)
        made[0] += 1
        if made[0] == 3:
            os.kill(os.getpid(), number)

    arguments = ["distill", "run.yaml", "--layers", "2", "--set", f"distill.weights={weights}", "-o"]
    code, _, err = call(monkeypatch, capsys, *arguments, "at-once")
    assert code == 0, err
    monkeypatch.setattr(ScheduledOptimizers, "step", interrupted)
    code, _, err = call(monkeypatch, capsys, *arguments, "stopped")
    assert code == 128 + number and "run the same command again to go on" in err and not Path("stopped").exists()
    code, _, err = call(monkeypatch, capsys, *arguments, "stopped")
    assert code == 0 and made == [4], err
    one, other = (load_file(Path(name) / "model.safetensors") for name in ("at-once", "stopped"))
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    assert not [path.name for path in folder.iterdir() if "training" in path.name]


def test_a_repaired_student_is_the_one_in_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(monkeypatch, capsys, "repair", "run.yaml", "--layers", "1-2", "-o", "repaired")
    assert code == 0, err
    assert "4 layers, " in out and "of them repaired on" in out and "mlp.down_proj" in out
    assert [path.name for path in folder.iterdir() if "solved" in path.name] == []
    settings = load_config("run.yaml", [])
    teacher, tokenizer = load_model("teacher")
    expected, result = repair(teacher, tokenizer, [1, 2], settings.distill)
    assert result.layers
    saved, _ = load_model("repaired")
    for value, other in zip(saved.parameters(), expected.parameters(), strict=True):
        assert torch.equal(value, other)
    card = Path("repaired/README.md").read_text(encoding="utf-8")
    assert "Repaired in closed form, without gradients" in card and "byte for byte" not in card


@pytest.mark.parametrize("layers", ["2", "0,3-4"])
def test_a_streamed_repair_is_that_in_memory(
    layers: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["repair", "run.yaml", "--layers", layers]
    code, in_memory, err = call(monkeypatch, capsys, *arguments, "-o", "in-memory")
    assert code == 0, err
    solve, calls = Regression.solve, []

    def stops(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return solve(*given)

    arguments += ["-o", "streamed", "--set", "distill.weights=stream"]
    monkeypatch.setattr(Regression, "solve", stops)
    code, _, err = call(monkeypatch, capsys, *arguments)
    assert code != 0 and not Path("streamed").exists()
    code, streamed, err = call(monkeypatch, capsys, *arguments)
    assert code == 0, err
    assert [line for line in streamed.splitlines() if "proj" in line] == [
        line for line in in_memory.splitlines() if "proj" in line
    ]
    one, other = (load_file(Path(name) / "model.safetensors") for name in ("in-memory", "streamed"))
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    assert "Repaired in closed form" in Path("streamed/README.md").read_text(encoding="utf-8")
    assert not [path.name for path in folder.iterdir() if "solved" in path.name]


@pytest.mark.parametrize("weights", ["memory", "stream"])
def test_what_a_repair_solved_for_another_teacher_is_not_taken(
    weights: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stops(*_: Any) -> None:
        raise KeyboardInterrupt

    arguments = ["repair", "run.yaml", "--layers", "2", "--set", f"distill.weights={weights}", "-o"]
    with monkeypatch.context() as patch:
        patch.setattr("layerpeel.training.repair.RepairWalk._move_student", stops)  # once the first layer is solved
        assert call(patch, capsys, *arguments, "repaired")[0] != 0
    assert list(Path("repaired-solved").glob("*.safetensors"))
    tensors = load_file("teacher/model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, "teacher/model.safetensors", {"format": "pt"})
    for place in ("repaired", "at-once"):
        code, _, err = call(monkeypatch, capsys, *arguments, place)
        assert code == 0, err
    one, other = (load_file(Path(name) / "model.safetensors") for name in ("repaired", "at-once"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_repair_of_nothing_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["repair", "run.yaml", "--layers", "2", "-o", "new", "--set", "distill.repair=false"]
    code, _, err = call(monkeypatch, capsys, *arguments)
    assert code == 2 and "distill.repair: false, so nothing to do" in err and "or use `remove`" in err


def test_verbs_that_do_not_run_need_no_stop(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "short.yaml").write_text(without_stop(folder))
    for command in (
        ["eval", "teacher", "run.yaml", "--json"],
        ["score", "run.yaml", "--json"],
        ["distill", "run.yaml", "--layers", "2", "-o", "healed"],
    ):
        with_stop, without = (
            call(monkeypatch, capsys, *[name if each == "run.yaml" else each for each in command], *options)
            for name, options in (("run.yaml", []), ("short.yaml", ["-o", "again"] if "-o" in command else []))
        )
        assert without[0] == with_stop[0] == 0, without[2]
        if "--json" in command:
            first, second = (json.loads(result[1]) for result in (with_stop, without))
            assert first | {"seconds": 0} == second | {"seconds": 0}


@pytest.mark.slow
def test_report_ls_export(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def ok(*arguments: str) -> str:
        code, out, err = call(monkeypatch, capsys, *arguments)
        assert code == 0, err
        return out

    assert "no runs below" in ok("ls", ".")
    assert "out/report/index.html" in ok("run", "run.yaml")
    assert "ms/token" in Path("out/report/index.html").read_text(encoding="utf-8")
    assert "again/index.html" in ok("report", "out", "out", "--no-measure", "-o", "again")
    assert "out/report/index.html" in ok("report", "out", "--watch")  # finished: it does not wait
    assert "finished" in ok("ls", ".") and json.loads(ok("ls", "out", "--json"))[0]["layers"] == 5
    assert "(round 1)" in ok("export", "out", "-o", "copy") and Path("copy/README.md").is_file()
    monkeypatch.setattr("layerpeel.export.hub.push", lambda folder, repository: f"https://hub.test/{repository}")
    assert "https://hub.test/me/short" in ok("export", "out", "-o", "pushed", "--round", "1", "--push", "me/short")
    code, _, err = call(monkeypatch, capsys, "export", "out", "-o", "none", "--round", "2")
    assert code == 2 and "out has no round 2: it has rounds 1 to 1" in err and not Path("none").exists()


@pytest.mark.slow
def test_score_shows_a_ranking_a_picture_and_an_estimate(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--set", "score.decide=task_quality", "--set", "score.shortlist={by: teacher_kl, keep: 3}"]
    code, out, err = call(monkeypatch, capsys, "score", "run.yaml", *arguments)
    assert code == 0, err
    scores = json.loads(Path("out-score/scores.json").read_text())
    lines = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit()]
    assert [line[0] for line in lines] == ["1", "2", "3"]
    assert {line[1] for line in lines} == set(scores["importance"]) and set(scores["stderr"]) == set(
        scores["importance"]
    )
    assert all(f"{scores['importance'][line[1]]:.5f}" == line[2] for line in lines)
    assert "± stderr" in out and "out-score/importance.png" in out
    assert Path("out-score/importance.png").read_bytes().startswith(b"\x89PNG")
    first, second = (line for line in err.splitlines() if "layer runs on each" in line)
    # 4 candidates of 6 layers: 6 + (4 + 3 + 2 + 1), against 6 + 4 * 5; then at most the 3 deepest-reaching
    assert first.startswith("teacher_kl: 64 tokens, 16 layer runs on each (one by one: 26), about ")
    assert second.startswith("task_quality: ") and "GB beside the weights" in second
    again = json.loads(call(monkeypatch, capsys, "score", "run.yaml", *arguments, "--json")[1])
    assert again["importance"] == scores["importance"] and again["cheap"]["importance"] == scores["cheap"]["importance"]


def test_eval_score_and_plan_ask_only_for_what_they_use(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text is gone, the output is taken by a file, and the target is not below the depth of a student of four."""
    code, _, err = call(monkeypatch, capsys, "remove", "teacher", "--layers", "2-3", "-o", "run/student")
    assert code == 0, err
    (folder / "text.txt").unlink()
    (folder / "out").touch()
    code, out, err = call(monkeypatch, capsys, "eval", "run/student", "run.yaml", "--set", "score.protect.layers=[5]")
    assert code == 0 and "choice" in out, err
    tasks_only = ["--set", "score.decide=task_quality", "--set", "score.protect.layers=[]", "-o", "scores"]
    code, out, err = call(monkeypatch, capsys, "score", "run.yaml", *tasks_only, "--set", "stop.target_layers=6")
    assert code == 0 and (folder / "scores/scores.json").is_file(), err
    code, _, err = call(monkeypatch, capsys, "score", "run.yaml", "-o", "more")  # teacher_kl reads text
    assert code == 2 and "no such file: text.txt" in err
    code, out, err = call(monkeypatch, capsys, "plan", "run.yaml", "--flops", "1e12")
    assert code == 0 and "rounds" in out, err


def test_a_model_that_eval_names_is_of_the_working_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "configs/teacher").mkdir(parents=True)  # no model
    for name in ("run.yaml", "choice.jsonl"):
        shutil.copy(folder / name, folder / "configs")
    code, out, err = call(monkeypatch, capsys, "eval", "teacher", "configs/run.yaml")
    assert code == 0 and "choice" in out, err


def test_a_student_is_written_into_the_working_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "here").mkdir()
    monkeypatch.chdir(folder / "here")
    for arguments in (
        ["distill", "../run.yaml", "--layers", "2"],
        ["repair", "../run.yaml", "--layers", "2"],
        ["remove", "../teacher", "--layers", "2"],
    ):
        code, _, err = call(monkeypatch, capsys, *arguments, "-o", ".")
        assert code == 0 and Path("model.safetensors").is_file(), err
        code, _, err = call(monkeypatch, capsys, *arguments, "-o", ".")
        assert code == 2 and "is not empty" in err
        for path in Path().iterdir():
            path.unlink()


@pytest.mark.parametrize(
    "command", ["run", "remove", "distill", "repair", "score", "export", "report", "study", "demo"]
)
def test_outputs_are_tried_before_the_work(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    peel(load_config("run.yaml", ["output=done", "distill.tokens_per_round=0"]))
    (folder / "study.yaml").write_text("{base: run.yaml, output: new, remove: 1}")
    arguments = {
        "run": ["run", "run.yaml"],
        "remove": ["remove", "teacher", "--layers", "2", "-o", "new"],
        "distill": ["distill", "run.yaml", "--layers", "2", "-o", "new"],
        "repair": ["repair", "run.yaml", "--layers", "2", "-o", "new"],
        "score": ["score", "run.yaml", "-o", "new"],
        "export": ["export", "done", "-o", "new"],
        "report": ["report", "done", "-o", "new"],
        "study": ["study", "study.yaml"],
        "demo": ["demo", "-o", "new"],
    }[command]
    monkeypatch.setattr("os.replace", refuse)
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert code == 2 and not out, err
    assert f"nothing can be written in {folder} (Read-only file system)" in err and "hint: name another folder" in err


def test_a_home_folder_in_an_option_is_expanded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    code, _, err = call(monkeypatch, capsys, "remove", "~/teacher", "--layers", "2", "--output=~/short")
    assert code == 0 and (folder / "short/model.safetensors").is_file(), err
    code, _, err = call(monkeypatch, capsys, "remove", "teacher", "--layers", "2", "-o", "~no_such_user/x")
    assert code == 2 and "~no_such_user/x" in err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_json_is_in_ascii_and_tables_do_without_unicode(
    folder: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """In a pipe of a code page that lacks blocks and arrows."""
    text = (folder / "run.yaml").read_text().replace("kind: choice", "kind: choice\n  name: задача→")
    (folder / "run.yaml").write_text(text, encoding="utf-8")

    def printed(*arguments: str) -> str:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        monkeypatch.setattr(sys, "argv", ["layerpeel", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        sys.stdout.flush()
        assert not stopped.value.code
        return sys.stdout.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]

    assert "#" in printed("score", "run.yaml", "-o", "s")
    assert "->" in printed("eval", "teacher", "run.yaml")
    assert "задача→" in str(json.loads(printed("eval", "teacher", "run.yaml", "--json")))
    assert printed("families") and printed("--help")


def test_a_streamed_distillation_is_that_in_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, *more in (("in-memory",), ("streamed", "--set", "distill.weights=stream")):
        code, out, err = call(monkeypatch, capsys, "distill", "run.yaml", "--layers", "1-2", "-o", place, *more)
        assert code == 0 and "4 layers, loss" in out, err
    one, other = (load_file(Path(name) / "model.safetensors") for name in ("in-memory", "streamed"))
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    cards = [Path(name, "README.md").read_text(encoding="utf-8") for name in ("in-memory", "streamed")]
    assert cards[0].replace("in-memory", "streamed") == cards[1] and "trained" in cards[1].lower()
    code, _, err = call(
        monkeypatch, capsys, "distill", "run.yaml", "--layers", "1", "-o", "none", *more, *TEACHERS_TEXT
    )
    assert code == 2 and "distill.weights: stream reads every layer from disk for every token" in err


def test_a_report_that_fails_hides_no_result(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(run: object) -> None:
        raise PermissionError(13, "Permission denied", "out/report")

    monkeypatch.setattr("layerpeel.report.page.write_report", fail)
    code, out, err = call(monkeypatch, capsys, "run", "run.yaml", "--set", "distill.tokens_per_round=0")
    assert code == 1 and "out/report: Permission denied" in err
    assert "ended    the target depth was reached" in out and "student  " in out


TEACHERS_TEXT = ["--set", "distill.text={from: teacher}"]


@pytest.mark.slow
def test_a_floor_exits_with_three(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--set", "tasks=[{kind: perplexity, data: text.txt}]", "--set", "stop.min_quality=1.0"]
    arguments += ["--set", "distill.tokens_per_round=0", "--set", "stop.target_layers=2"]
    code, _, err = call(monkeypatch, capsys, "run", "run.yaml", *arguments)
    if code == 3:
        assert "stopped by the quality floor" in err
    else:  # no removal hurt this random model
        assert code == 0


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no such config": (["run", "rum.yaml"], "no such config: rum.yaml"),
    "a path of Windows": (["run", "run.yaml", "--set", "teacher='C:\\models\\x'"], "a path of Windows leads nowhere"),
    "text of Windows": (["run", "run.yaml", "--set", "distill.text='D:/x.txt'"], "a path of Windows leads nowhere"),
    "output of Windows": (["run", "run.yaml", "--set", "output='C:\\x'"], "a path of Windows leads nowhere"),
    "another home": (["run", "run.yaml", "--set", "output=~no_such_user/x"], "output: ~no_such_user/x: "),
    "scores in the way": (["score", "run.yaml", "-o", "odd"], "scores.json is a folder, where a file has to be"),
    "a file in the way": (["report", "teacher", "-o", "run.yaml"], "teacher holds no run"),
    "no such model": (["run", "run.yaml", "--set", "teacher=./nowhere"], "no such model: ./nowhere"),
    "not a causal model": (["run", "run.yaml", "--set", "teacher=bert"], "bert is not a causal language model"),
    "not a model folder": (["remove", "empty", "--layers", "1", "-o", "x"], "empty is not a model folder"),
    "target not below": (["run", "run.yaml", "--set", "stop.target_layers=6"], "6 is not below the teacher's depth"),
    "target protected": (["run", "run.yaml", "--set", "stop.target_layers=1"], "1 cannot be reached: 2 of 6"),
    "size not below": (["run", "run.yaml", "--set", "stop={max_params: 1e9}"], "is not below the teacher's"),
    "size out of reach": (["run", "run.yaml", "--set", "stop={max_params: 9}"], "stop.max_params: 9 cannot be reached"),
    "no stop": (["run", "run.yaml", "--set", "stop={}"], "stop: expected at least one of target_layers"),
    "run without a stop": (["run", "endless.yaml"], "stop: not given, and a run has to know when it is over"),
    "plan without a stop": (["plan", "endless.yaml"], "stop: not given, and a run has to know when it is over"),
    "empty text": (["run", "run.yaml", "--set", "distill.text=empty.txt"], "empty.txt: the file is empty"),
    "missing text": (["run", "run.yaml", "--set", "distill.text=gone.txt"], "no such file: gone.txt"),
    "not UTF-8": (["run", "run.yaml", "--set", "distill.text=latin.txt"], "latin.txt: not UTF-8 (byte 3)"),
    "not JSON": (["run", "run.yaml", "--set", "distill.text=bad.jsonl"], "bad.jsonl, line 2: not JSON"),
    "no column": (["run", "run.yaml", "--set", "distill.text=choice.jsonl"], "there: context, choices, answer"),
    "unknown task": (["run", "run.yaml", "--set", "tasks=[{kind: choise, data: x.jsonl}]"], "did you mean 'choice'"),
    "unknown metric": (["run", "run.yaml", "--set", "score.decide=teacher_lk"], "did you mean 'teacher_kl'"),
    "unknown key": (["run", "run.yaml", "--set", "stop.target_layer=5"], "did you mean 'target_layers'"),
    "unknown section": (["run", "run.yaml", "--set", "distil={}"], "did you mean 'distill'"),
    "unknown loss": (["run", "run.yaml", "--set", "distill.losses={k: {}}"], "unknown loss 'k'"),
    "not a number": (["run", "run.yaml", "--set", "distill.batch_size=many"], "distill.batch_size: input should be"),
    "bad --set": (["run", "run.yaml", "--set", "stop"], "--set stop: expected section.field=value"),
    "other vocabulary": (["run", "run.yaml", "--set", "teacher=mixed"], "have different vocabularies"),
    "another run": (["run", "run.yaml", "--set", "output=used"], "used is not empty, and what it holds is no run"),
    "bad layers": (["remove", "teacher", "--layers", "one", "-o", "x"], "--layers one: expected layer numbers"),
    "no such layer": (["remove", "teacher", "--layers", "9", "-o", "x"], "layer 9 cannot be removed"),
    "no run": (["report", "teacher"], "teacher holds no run: there is no journal.jsonl in it"),
    "no run to export": (["export", "teacher", "-o", "x"], "teacher holds no run"),
    "no folder of runs": (["ls", "nowhere"], "no such folder: nowhere"),
    "output in use": (["remove", "teacher", "--layers", "1", "-o", "used"], "used is not empty"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_a_message_and_exit_code_two(
    mistake: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty").mkdir()
    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "endless.yaml").write_text(without_stop(folder))
    (folder / "bad.jsonl").write_text('{"text": "w5"}\n{"text": \n')
    (folder / "used").mkdir()
    (folder / "odd/scores.json").mkdir(parents=True)
    (folder / "used/thesis.tex").touch()
    BertForMaskedLM(
        BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    ).save_pretrained(folder / "bert")
    shutil.copytree(folder / "teacher", folder / "mixed")
    larger = tiny_tokenizer()
    larger.add_tokens(["w64", "w65"])
    larger.save_pretrained(folder / "mixed")
    arguments, message = MISTAKES[mistake]
    before = set(folder.rglob("*"))
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert code == 2 and not out
    assert message in err and "error:" in err and "hint:" in err
    assert "Traceback" not in err
    left = {path for path in set(folder.rglob("*")) - before if path.is_file() and path.parent.name != "out"}
    assert not left


@pytest.mark.slow
def test_words_from_outside_cannot_style_the_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "run.yaml").write_text(
        (folder / "run.yaml").read_text().replace("kind: choice", "kind: choice\n  name: '[red]x[/]'")
    )
    code, out, _ = call(monkeypatch, capsys, "run", "run.yaml")
    assert code == 0 and "[red]x[/]" in out


def test_init_writes_a_config_and_says_what_comes_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speed = Speed(1e-3, 1e-3, 0.0, 0.0, 0.0, 1e-3, 0.0, 0.0)
    monkeypatch.setattr(Speed, "measure", classmethod(lambda cls, *given, **options: speed))
    arguments = ["init", "teacher", "-o", "my.yaml", "--text", "text.txt", "--minutes", "20", "--no-harness"]
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert code == 0, err
    assert "6 layers to 5" in out and "held out my-held-out.jsonl" in out
    assert out.splitlines()[-1] == "next     layerpeel run my.yaml"
    code, planned, err = call(monkeypatch, capsys, "plan", "my.yaml", "--json")
    assert code == 0, err
    assert 0.6 * 1200 < sum(json.loads(planned)["seconds"].values()) < 0.9 * 1200
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "") and "error: --output: my.yaml is there already" in err
    code, out, err = call(monkeypatch, capsys, "init", "teacher", "-o", "b.yaml", "--gpu-memory", "much")
    assert (code, out) == (2, "") and "error: --gpu-memory much: expected a size" in err and "--gpu-memory 24GB" in err
    code, out, err = call(monkeypatch, capsys, "init", "teacher", "-o", "b.yaml", "--gpu-memory", "1MB", "--no-harness")
    assert (code, out) == (2, "") and "the smallest run of it takes" in err and not Path("b.yaml").exists()


@pytest.mark.parametrize(
    ("option", "value"), [("--flops", "-1"), ("--flops", "0"), ("--flops", "nan"), ("--bandwidth", "0")]
)
def test_speeds_that_cannot_be_are_refused(
    option: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(monkeypatch, capsys, "plan", "run.yaml", option, value)
    assert code == 2 and "expected a finite number above 0" in " ".join(err.replace("│", " ").split())


def test_minutes_without_end_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(monkeypatch, capsys, "init", "teacher", "-o", "new.yaml", "--minutes", "inf")
    assert code == 2 and "expected a finite number above 0" in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize("name", ["d #1", "x: y", "@x", "ü🤖"])
def test_the_demo_runs_in_the_folder_that_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_run(config: RunConfig) -> None:
        raise RunError(f"in {config.output}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("layerpeel.run.loop.peel", no_run)
    code, _, err = call(monkeypatch, capsys, "demo", "-o", name)
    assert code == 1 and f"error: in {name}/run" in " ".join(err.split())
