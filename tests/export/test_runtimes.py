"""`layerpeel export --to`: what is called, what is written, and that nothing half done is left."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from layerpeel.export.verify.worker import call_python
from tests.export.conftest import Call, changed


@pytest.mark.slow
@pytest.mark.usefixtures("short_text")
def test_gguf_files_are_written_and_verified(student: Path, llama_cpp: Path, tmp_path: Path, command: Call) -> None:
    out = tmp_path / "files"
    export = ("export", student, "--to", "gguf", "--llama-cpp", llama_cpp, "-o", out)
    code, printed, err = command(*export, "--quantize", "q8_0")
    assert code == 0, err
    assert sorted(path.name for path in out.iterdir()) == ["plain-bf16.gguf", "plain-q8_0.gguf", "verified.json"]
    assert printed.count("verdict      right") == 2 and "plain-q8_0.gguf in plain-q8_0.gguf: xllamacpp" in printed
    said = json.loads((out / "verified.json").read_text())
    assert [verdict["right"] for verdict in said.values()] == [True, True]
    code, _, err = command(*export)
    assert code == 2 and f"--output: {out} is not empty" in err


@pytest.mark.slow
@pytest.mark.usefixtures("short_text")
def test_a_wrong_file_is_kept_and_told(student: Path, llama_cpp: Path, tmp_path: Path, command: Call) -> None:
    converter = llama_cpp / "convert_hf_to_gguf.py"
    converter.write_text(converter.read_text().replace("Path(out))", "Path(out), rope_theta=1e6)"))
    code, printed, _ = command("export", student, "--to", "gguf", "--llama-cpp", llama_cpp, "-o", tmp_path / "files")
    assert code == 1 and "likely       rope base (rope_theta): 10000 in the student, 1e+06 there" in printed
    assert (tmp_path / "files/plain-bf16.gguf").is_file()


def test_nothing_is_left_of_a_quantisation_that_fails(
    student: Path, llama_cpp: Path, tmp_path: Path, command: Call
) -> None:
    arguments = ("export", student, "--to", "gguf", "--quantize", "q4_0", "--llama-cpp", llama_cpp)
    code, _, err = command(*arguments, "-o", tmp_path / "files")
    assert code == 1 and "llama-quantize Q4_0 failed: no such type: Q4_0" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama.cpp"]


def test_a_student_that_llama_cpp_cannot_run_is_refused(
    student: Path, llama_cpp: Path, tmp_path: Path, command: Call
) -> None:
    other = changed(student, tmp_path / "smollm3", model_type="smollm3", no_rope_layers=[1, 0, 1, 1])
    code, _, err = command("export", other, "--to", "gguf", "--llama-cpp", llama_cpp, "-o", tmp_path / "files")
    assert code == 2 and "llama.cpp cannot say which layers this smollm3 has left" in err
    assert not (tmp_path / "files").exists()


@pytest.mark.usefixtures("in_process")
def test_optimum_is_called_in_the_python_that_is_named(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Call
) -> None:
    """What it writes is put in place, and then verified."""
    calls: list[tuple[str, ...]] = []

    def call(python: str, arguments: list[str], *_: str) -> str:
        calls.append((python, *arguments))
        Path(arguments[-1], "model.onnx").write_bytes(b"")
        return ""

    monkeypatch.setattr("layerpeel.export.runtimes.call_python", call)
    code, _, err = command("export", student, "--to", "onnx", "--python", "envs/onnx", "-o", tmp_path / "files")
    ((python, *arguments),) = calls
    assert python == "envs/onnx" and arguments[1:4] == ["optimum.commands.optimum_cli", "export", "onnx"]
    assert arguments[arguments.index("--model") + 1] == str(student) and "text-generation-with-past" in arguments
    assert code != 0 and "onnx" in err  # the file is empty, or there is no ONNX Runtime here
    assert (tmp_path / "files/model.onnx").is_file()
    assert (tmp_path / "files/tokenizer.json").read_bytes() == (student / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "ggml", "-o", "new"], "--to ggml: there is no such runtime; available: gguf, onnx, openvino, vllm"),
        (["--to", "onnx", "--quantize", "q8_0", "-o", "new"], "--quantize q8_0: only GGUF files are quantised"),
        (["--to", "vllm", "-o", "new"], "--output new: vLLM reads the checkpoint, nothing is written"),
        (["--to", "gguf", "--llama-cpp", "none", "-o", "new"], "--llama-cpp none holds no convert_hf_to_gguf.py"),
        (["--to", "onnx", "--push", "me/it", "-o", "new"], "--push me/it: with --to nothing is uploaded"),
        (["--to", "onnx"], "--output is missing: where to write the student"),
        (["--quantize", "q8_0", "-o", "new"], "--quantize: only for another runtime"),
        (["--to", "onnx", "--python", "no/such", "-o", "new"], "--python no/such: it cannot be started"),
    ],
)
def test_bad_options_are_told(
    arguments: list[str], message: str, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Call
) -> None:
    if "gguf" in arguments:
        pytest.importorskip("gguf", reason="needs the package gguf (extra deploy)")
    monkeypatch.chdir(tmp_path)
    code, _, err = command("export", student, *arguments)
    assert code == 2 and message in err and not Path("new").exists()


@pytest.mark.slow
def test_a_worker_runs_in_another_python(student: Path, command: Call) -> None:
    """As a process of its own, which imports nothing of this package."""
    code, out, err = command("verify", student, "--against", student, "--python", sys.executable, "--tokens", "64")
    assert code == 0, err
    assert "verdict      right" in out
    code, _, err = command("verify", student, "--against", student, "--runtime", "vllm", "--tokens", "64")
    if code == 2:
        assert "has no package vllm" in err and "-m pip install vllm" in err


def test_a_script_that_fails_is_told(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import sys\nprint('first', file=sys.stderr)\nraise SystemExit('no weights')")
    with pytest.raises(Exception, match="the work failed: no weights"):
        call_python(sys.executable, [str(tmp_path / "script.py")], "the work", "nothing")
