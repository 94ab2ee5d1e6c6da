"""Speed beside the teacher: medians of turns, what runtimes are asked, and that the run remembers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from layerpeel.config.reading import parse_config
from layerpeel.errors import RunError
from layerpeel.export import timing
from layerpeel.export.timing import Load, Rate, time_beside, time_gguf, time_vllm
from layerpeel.export.verify.answers import Question
from layerpeel.export.verify.runtimes import ask
from layerpeel.export.workers import exchange
from layerpeel.report.page import write_report
from layerpeel.report.runtimes import Rates, runtimes_path, verified_rows
from layerpeel.run.folder import Run
from layerpeel.run.loop import peel
from tests.export.conftest import Call, changed, save_student


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that took two of a Qwen2's four layers, without training; not to be changed."""
    folder = tmp_path_factory.mktemp("peeled")
    save_student(folder / "teacher")
    (folder / "text.jsonl").write_text(json.dumps({"text": "once upon a time there was a cat " * 20}) + "\n")
    text = str(folder / "text.jsonl")
    config = {
        "teacher": str(folder / "teacher"),
        "output": str(folder / "run"),
        "stop": {"target_layers": 2},
        "score": {"decide": "block_influence", "shortlist": None, "text": [text], "tokens": 64},
        "tasks": [{"kind": "perplexity", "name": "ppl", "data": text}],
        "distill": {"tokens_per_round": 0},
    }
    peel(parse_config(config, "test"))
    return folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "peeled"))


def test_medians_are_of_turns_and_ratios_of_pairs() -> None:
    """The machine halves its speed after the first turn, which the ratios do not see."""
    calls: list[str] = []
    rates = iter([(100, 10), (120, 13), (50, 5), (60, 6), (40, 5), (50, 6.5)])

    def measure(path: Path) -> Rate:
        calls.append(path.name)
        return Rate(*next(rates))

    speed = time_beside(measure, Path("teacher"), Path("student"), Load([1, 2, 3], 4), turns=3)
    assert calls == ["teacher", "student"] * 3
    assert speed.prompt == Rates(50, 60, 1.2) and speed.generation == Rates(5, 6.5, 1.3)
    assert (speed.prompt_tokens, speed.new_tokens, speed.turns) == (3, 4, 3)


@pytest.mark.parametrize(("tokens", "prompt", "new"), [(512, 256, 64), (2000, 256, 64), (100, 50, 51), (3, 1, 2)])
def test_prompt_and_new_tokens_fit_into_a_short_text(tokens: int, prompt: int, new: int) -> None:
    load = Load.of(Question("", list(range(tokens)), []))
    assert load.prompt == list(range(prompt)) and load.new_tokens == new
    assert prompt + new <= max(tokens, 320)


@pytest.mark.parametrize(
    ("answer", "rate"),
    [
        ({"timings": {"prompt_n": 3, "prompt_ms": 30, "predicted_n": 5, "predicted_ms": 200}}, Rate(100, 20)),
        ({"content": "a server that says no times"}, None),
        ({"timings": {"prompt_n": 3, "prompt_ms": 0, "predicted_n": 1, "predicted_ms": 0}}, None),
    ],
)
def test_llama_cpp_says_how_long_it_took(
    answer: dict[str, Any], rate: Rate | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first token comes out of the prompt: four are generated in 0.2 seconds."""
    asked: list[dict[str, Any]] = []

    @contextmanager
    def serving(file: Path, context: int, *_: Any) -> Iterator[tuple[str, str]]:
        assert context >= 8
        yield "http://127.0.0.1:1", "llama.cpp b1"

    def request_json(address: str, body: dict[str, Any]) -> dict[str, Any]:
        asked.append(body)
        return answer

    monkeypatch.setattr(timing, "serving", serving)
    monkeypatch.setattr(timing, "request_json", request_json)
    if rate is None:
        with pytest.raises(RunError, match=r"llama\.cpp b1 says no time for a\.gguf"):
            time_gguf(Path("a.gguf"), Load([1, 2, 3], 5))
        return
    assert time_gguf(Path("a.gguf"), Load([1, 2, 3], 5)) == rate
    assert [body["n_predict"] for body in asked] == [2, 5]
    assert all(body["ignore_eos"] and not body["cache_prompt"] and body["prompt"] == [1, 2, 3] for body in asked)


def test_a_worker_is_timed_by_the_fastest_of_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds a token, 2 for the prompt; each repeat but the last is slower."""
    counts: list[int] = []

    def seconds(ids: list[int], count: int) -> float:
        counts.append(count)
        return 2 + 10 * (count - 1) + (0 if len(counts) in (4, 7) else 5)

    def call(python: str, arguments: list[str], what: str, packages: str) -> str:
        folder = Path(arguments[2])
        request = json.loads((folder / "request.json").read_text())
        assert python == "envs/vllm" and arguments[1] == "with_vllm" and request["timed"]
        assert request["model"] == str(Path("student").absolute()) and packages == "vllm"
        exchange.time(SimpleNamespace(seconds=seconds, version="vLLM 1"), request, folder)
        return ""

    monkeypatch.setattr("layerpeel.export.verify.worker.call_python", call)
    assert time_vllm(Path("student"), Load([1, 2, 3, 4], 6), "envs/vllm") == Rate(4 / 2, 6 / 60)
    assert counts == [2, 1, 1, 1, 7, 7, 7]


@pytest.mark.usefixtures("in_process")
def test_a_run_remembers_what_was_verified(run: Path, command: Call) -> None:
    code, _, err = command("verify", run, "--against", run / "student", "--tokens", "32")
    assert code == 0, err
    (row,) = verified_rows(Run(run))
    assert row.name == "transformers" and row.kind == "safetensors" and row.right and row.speed is None
    assert (row.round, row.layers, row.teacher_layers, row.precision) == (2, 2, 4, "fp32")
    assert row.mean_kl < 1e-6 and row.bytes == (run / "student/model.safetensors").stat().st_size
    code, _, _ = command("verify", run, "--against", run / "student", "--tokens", "32")
    assert verified_rows(Run(run))[0].time > row.time and len(verified_rows(Run(run))) == 1
    wrong = changed(run / "student", run.parent / "wrong", rope_parameters={"rope_theta": 1e6, "rope_type": "default"})
    code, _, _ = command("verify", run, "--against", wrong)
    assert code == 1 and [row.right for row in verified_rows(Run(run))] == [False]


@pytest.mark.usefixtures("in_process")
def test_a_run_that_may_only_be_read_is_verified_all_the_same(run: Path, command: Call) -> None:
    shutil.rmtree(run / "report", ignore_errors=True)
    (run / "report").write_text("in the way")
    code, out, err = command("verify", run, "--against", run / "student", "--tokens", "32")
    assert code == 0 and "verdict      right" in out and "not kept beside the run:" in err


@pytest.mark.slow
@pytest.mark.usefixtures("short_text")
def test_gguf_files_are_timed_and_remembered(
    run: Path, llama_cpp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Call
) -> None:
    monkeypatch.setitem(timing.TURNS, "gguf", 1)
    out_folder = tmp_path / "files"
    code, out, err = command(
        "export", run, "--to", "gguf", "--llama-cpp", llama_cpp, "--speed", "-o", out_folder, "--json"
    )
    assert code == 0 and "writing the teacher's files, to time them" in err, err
    (said,) = json.loads(out)
    assert json.loads((out_folder / "verified.json").read_text()) == {
        "peeled-bf16.gguf": {name: value for name, value in said.items() if name != "path"}
    }
    (row,) = verified_rows(Run(run))
    assert row.speed and (row.kind, row.round, row.right) == ("f32", 2, True)
    assert (row.speed.prompt_tokens, row.speed.new_tokens, row.speed.turns) == (24, 25, 1)
    assert said["speed"]["generation"]["ratio"] == row.speed.generation.ratio > 0
    assert row.bytes and row.teacher_bytes and row.bytes < row.teacher_bytes == said["teacher_bytes"]
    assert not list(tmp_path.glob("layerpeel-*"))  # the teacher's files are gone
    page = write_report(Run(run), measure=False)
    assert "xllamacpp f32" in (page.parent / "figures/speed.svg").read_text()
    assert f"llama-server -m {out_folder / 'peeled-bf16.gguf'}" in page.read_text()


@pytest.fixture
def as_vllm(in_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM is asked, transformers answers."""

    def ask_transformers(other: str, question: Any, reference: Any, options: Any) -> Any:
        assert options.runtime == "vllm"
        return replace(ask(other, question, reference, replace(options, runtime="transformers")), runtime="vLLM 1.0")

    monkeypatch.setattr("layerpeel.export.runtimes.ask", ask_transformers)


@pytest.mark.usefixtures("as_vllm", "short_text")
def test_rounds_are_timed_in_vllm_and_each_adds_a_row(
    run: Path, monkeypatch: pytest.MonkeyPatch, command: Call
) -> None:
    """Their speed is that of their layers, and of nothing else."""

    def by_layers(folder: Path, load: Load, *_: Any, **options: Any) -> Rate:
        layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
        return Rate(12 / layers, 24 / layers)

    monkeypatch.setattr("layerpeel.export.runtimes.time_vllm", by_layers)
    code, out, err = command("export", run, "--to", "vllm", "--speed", "--round", "1")
    assert code == 0, err
    assert "prompt 3.0 → 4.0 tokens/s, 1.33 times; generation 6.0 → 8.0 tokens/s, 1.33 times (24 + 25 tokens" in out
    code, _, err = command("export", run, "--to", "vllm", "--speed")
    assert code == 0, err
    rows = verified_rows(Run(run))
    assert [(row.name, row.kind, row.round, row.layers) for row in rows] == [
        ("vLLM", "safetensors", 1, 3),
        ("vLLM", "safetensors", 2, 2),
    ]
    assert [row.speed.generation if row.speed else None for row in rows] == [
        Rates(6, 8, pytest.approx(4 / 3)),
        Rates(6, 12, 2),
    ]
    assert [row.layers_ratio for row in rows] == [pytest.approx(4 / 3), 2]


@pytest.mark.usefixtures("as_vllm", "short_text")
def test_verdicts_are_not_lost_when_timing_fails(run: Path, monkeypatch: pytest.MonkeyPatch, command: Call) -> None:
    def fail(*_: Any, **options: Any) -> Rate:
        raise RunError("vLLM has fallen over")

    monkeypatch.setattr("layerpeel.export.runtimes.time_vllm", fail)
    code, out, err = command("export", run, "--to", "vllm", "--speed")
    assert code == 1 and "error: vLLM has fallen over" in err and "verdict      right" in out
    assert [row.right for row in verified_rows(Run(run))] == [True]


def test_a_checkpoints_teacher_is_what_its_card_names(student: Path, tmp_path: Path) -> None:
    from layerpeel.export.source import Source

    shutil.copytree(student, tmp_path / "teacher")
    copy = Path(shutil.copytree(student, tmp_path / "copy"))
    (copy / "README.md").write_text("---\nbase_model: teacher\n---\n")
    assert Source(str(copy)).teacher() == tmp_path / "teacher"
    assert Source(str(copy), overrides=[f"teacher={student}"]).teacher() == student


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["--to", "onnx", "-o", "new"], "--speed: nothing is timed in onnx", "only in gguf and vllm"),
        (["-o", "new"], "--speed: only for another runtime", "--to gguf"),
        (["--to", "vllm"], "does not say where its teacher is", "--set teacher=PATH"),
        (["--to", "vllm", "--set", "teacher=wide"], "hidden_size is 32, and 64 in the student", "--set teacher=PATH"),
        (["--to", "vllm", "--set", "teacher=flat"], "num_hidden_layers is 1, and 4 in the", "--set teacher=PATH"),
        (
            ["--to", "vllm", "--set", "dtype=x"],
            "--set dtype=x: only the teacher's place can be set here",
            "teacher=PATH",
        ),
    ],
)
def test_before_anything_long_it_says_what_is_missing(
    arguments: list[str],
    message: str,
    hint: str,
    student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Call,
) -> None:
    monkeypatch.chdir(tmp_path)
    changed(student, tmp_path / "wide", hidden_size=32)
    changed(student, tmp_path / "flat", num_hidden_layers=1, layer_types=["full_attention"])
    code, out, err = command("export", student, *arguments, "--speed")
    said = " ".join(err.split())
    assert code == 2 and message in said and hint in said.split("hint:")[1] and out == ""
    assert not Path("new").exists()


def test_a_runs_teacher_that_is_gone_is_said_first(run: Path, monkeypatch: pytest.MonkeyPatch, command: Call) -> None:
    monkeypatch.setattr("layerpeel.export.verify.reference.load_model", None)
    teacher = Path(Run(run).config.teacher)
    moved = teacher.rename(teacher.with_name("elsewhere"))
    try:
        code, _, err = command("export", run, "--to", "vllm", "--speed")
        assert code == 2 and f"teacher: {teacher} is gone" in err and "--set teacher=PATH" in err
    finally:
        moved.rename(teacher)
    assert not runtimes_path(run).exists()
