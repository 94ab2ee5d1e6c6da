"""GGUF files of a tiny student in a real llama.cpp, and the pattern of windows in their headers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from layerpeel.errors import InputError
from layerpeel.model.layer_cycles import counted_pattern, gguf_pattern
from tests.export.conftest import Call

gguf = pytest.importorskip("gguf", reason="needs the package gguf (extra deploy)")

from layerpeel.export.gguf import parse_kinds, write_pattern  # noqa: E402
from layerpeel.export.verify.gguf_header import read_header  # noqa: E402
from tests.export.tiny_gguf import write_gguf  # noqa: E402


@pytest.fixture
def llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's llama.cpp, on one thread."""
    pytest.importorskip("xllamacpp", reason="needs a llama.cpp: the package xllamacpp (extra deploy)")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("layerpeel.export.verify.llama_cpp.THREADS", "1")


@pytest.mark.slow
@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.parametrize("fault", ["none", "rope", "head", "tokenizer"])
def test_a_file_in_llama_cpp(fault: str, student: Path, tmp_path: Path, command: Call) -> None:
    embedding = load_file(student / "model.safetensors")["model.embed_tokens.weight"]
    wrong = (embedding + 0.1 * torch.randn_like(embedding)).numpy()
    faults = {"none": {}, "rope": {"rope_theta": 1e6}, "head": {"head": wrong}, "tokenizer": {"merges": ["Ġ t"]}}
    write_gguf(student, tmp_path / "student.gguf", **faults[fault])
    code, out, err = command("verify", student, "--against", tmp_path / "student.gguf", "--tokens", "128", "--json")
    (said,) = json.loads(out)
    assert code == (fault != "none"), err
    assert said["runtime"].startswith("xllamacpp") and said["precision"] == "fp32"
    assert (said["mean_kl"] < 1e-5) == (fault in ("none", "tokenizer"))
    if fault == "none":
        assert said["causes"] == [] and said["same_greedy_text"] and said["same_top"] == 1
    else:
        assert all(cause.startswith(fault) for cause in said["causes"])
        assert len(said["causes"]) == (1 if fault == "tokenizer" else 2)  # by its header, and by its error


@pytest.mark.slow
@pytest.mark.usefixtures("llama_cpp")
@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"sliding_window": 32}, "attention window: 64 in the student, 32 there"),
        (
            {"sliding_window": 64, "sliding_window_pattern": [True, True, False, False]},
            "window pattern (which layers attend to a window only): wfwf in the student, wwff there",
        ),
    ],
)
def test_a_wrong_window_in_a_header_is_named(
    fields: dict[str, object], cause: str, windowed: Path, tmp_path: Path, command: Call
) -> None:
    file = tmp_path / "student.gguf"
    write_gguf(windowed, file, fields={f"qwen2.attention.{name}": value for name, value in fields.items()})
    code, out, err = command("verify", windowed, "--against", file, "--tokens", "128", "--json")
    (said,) = json.loads(out)
    assert code == 1, err
    assert said["causes"][0] == cause


def test_a_damaged_file_is_told(student: Path, tmp_path: Path, command: Call) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF, they said" * 100)
    code, _, err = command("verify", student, "--against", tmp_path / "bad.gguf")
    assert code == 2 and "bad.gguf is no GGUF file, or a damaged one" in err


def test_without_llama_cpp_it_says_what_to_do(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Call
) -> None:
    write_gguf(student, tmp_path / "student.gguf")
    monkeypatch.setenv("PATH", "")
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    code, _, err = command("verify", student, "--against", tmp_path / "student.gguf", "--python", bare)
    assert code == 2 and "there is no llama.cpp to run a GGUF file: the PATH has no llama-server" in err
    assert "pip install xllamacpp" in err and "--target llama-server" in err


def test_the_pattern_is_written_and_all_else_stays(student: Path, tmp_path: Path) -> None:
    file = tmp_path / "student.gguf"
    extra = {"qwen2.attention.sliding_window": 64, "general.tags": ["a", "b"], "qwen2.scale": 0.5}
    write_gguf(student, file, fields=extra)
    before = gguf.GGUFReader(file)
    write_pattern(file, [True, False, False, True])
    after = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in after.fields.items()}
    assert fields.pop("qwen2.attention.sliding_window_pattern") == [True, False, False, True]
    counts = ("GGUF.kv_count", "GGUF.tensor_count")
    olds = {name: field.contents() for name, field in before.fields.items()}
    assert fields["GGUF.kv_count"] == olds["GGUF.kv_count"] + 1
    assert {n: v for n, v in fields.items() if n not in counts} == {n: v for n, v in olds.items() if n not in counts}
    assert [tensor.name for tensor in after.tensors] == [tensor.name for tensor in before.tensors]
    for one, other in zip(before.tensors, after.tensors, strict=True):
        assert one.tensor_type == other.tensor_type and (one.data == other.data).all()
    write_pattern(file, [False, False, False, True])
    assert read_header(file).facts["sliding_layers"] == [False, False, False, True]
    assert [path.name for path in tmp_path.iterdir()] == ["student.gguf"]


def config_with(family: str, kinds: list[str]) -> PretrainedConfig:
    fields = {"num_hidden_layers": len(kinds), "layer_types": kinds, "sliding_window": 8}
    return CONFIG_MAPPING[family](**fields)


def test_a_pattern_out_of_the_cycle_is_to_be_written() -> None:
    window, full = "sliding_attention", "full_attention"
    whole = config_with("gemma3_text", [*[window] * 5, full] * 2)
    assert gguf_pattern(whole) is None and counted_pattern(whole) == [*[True] * 5, False] * 2
    broken = config_with("gemma3_text", [*[window] * 3, full, *[window] * 5, full])
    assert gguf_pattern(broken) == [*[True] * 3, False, *[True] * 5, False]
    assert counted_pattern(broken) == [*[True] * 5, False, *[True] * 4]


def test_what_llama_cpp_cannot_say_is_refused() -> None:
    config = CONFIG_MAPPING["smollm3"](num_hidden_layers=3, no_rope_layers=[1, 0, 1])
    with pytest.raises(InputError, match=r"llama\.cpp cannot say which layers this smollm3 has left: .* cycle of 4"):
        gguf_pattern(config)


def test_kinds_of_files() -> None:
    assert parse_kinds(None) == [] and parse_kinds("Q4_K_M, q8_0") == ["q4_k_m", "q8_0"]
    with pytest.raises(InputError, match="there is no 'q4_k_n'; did you mean 'q4_k_"):
        parse_kinds("q4_k_n")
    with pytest.raises(InputError, match="q8_0 is named twice"):
        parse_kinds("q8_0,q8_0")


def test_precision_and_facts_of_a_header(student: Path, tmp_path: Path) -> None:
    write_gguf(student, tmp_path / "student.gguf")
    header = read_header(tmp_path / "student.gguf")
    assert header.precision == "fp32" and header.architecture == "qwen2"
    assert header.facts == {"layers": 4, "rope_theta": 10000, "separate_head": False}
    assert AutoConfig.from_pretrained(student).num_hidden_layers == 4
