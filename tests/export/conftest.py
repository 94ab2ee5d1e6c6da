"""A tiny student whose attention matters, with a byte-level tokenizer that reads any text."""

from __future__ import annotations

import importlib
import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import layerpeel.demo
from layerpeel.export import runtimes as runtimes  # else one that is imported under `in_process` keeps its `call`
from layerpeel.export.workers import exchange

TOKENIZER = Path(layerpeel.demo.__file__).parent / "teacher"
WINDOW = 64
CONVERTER = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.export.tiny_gguf import write_gguf
folder, out, kind = sys.argv[1], sys.argv[3], sys.argv[5]
assert sys.argv[2::2] == ["--outfile", "--outtype"]
write_gguf(Path(folder), Path(out))
"""
QUANTISER = "#!/bin/sh\ntest $3 = Q8_0 || { echo no such type: $3 >&2; exit 1; }\nexec cp $1 $2\n"


def save_student(folder: Path, **fields: Any) -> None:
    """Writes a random Qwen2 of four layers; scaled so that what it attends to decides what it says."""
    torch.manual_seed(0)
    shape = {"vocab_size": 606, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True}
    model = AutoModelForCausalLM.from_config(Qwen2Config(**(shape | heads | ends | fields)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
        model.get_input_embeddings().weight.normal_(0, 0.3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in which all layers attend to all tokens."""
    folder = tmp_path_factory.mktemp("students") / "plain"
    save_student(folder)
    return folder


@pytest.fixture(scope="session")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in which every other layer has a window."""
    folder = tmp_path_factory.mktemp("students") / "windowed"
    kinds = ["sliding_attention", "full_attention"] * 2
    save_student(folder, use_sliding_window=True, sliding_window=WINDOW, layer_types=kinds)
    return folder


def changed(folder: Path, target: Path, **fields: Any) -> Path:
    """A copy of a checkpoint whose config says something else."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | fields))
    return target


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers run in this process, which starts in no time."""

    def call(python: str, arguments: list[str], *_: str) -> str:
        _, module, place = arguments
        folder = Path(place)
        runtime = importlib.import_module(f"layerpeel.export.workers.{module}").Runtime
        request = json.loads((folder / "request.json").read_text())
        exchange.answer(runtime(request), request, folder)
        return ""

    monkeypatch.setattr("layerpeel.export.verify.worker.call_python", call)


@pytest.fixture
def llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of llama.cpp, as far as it is called: its converter, its quantiser; served by the package."""
    pytest.importorskip("gguf", reason="needs the package gguf (extra deploy)")
    pytest.importorskip("xllamacpp", reason="needs a llama.cpp: the package xllamacpp (extra deploy)")
    monkeypatch.setattr("layerpeel.export.verify.llama_cpp.THREADS", "1")
    folder = tmp_path / "llama.cpp"
    (folder / "build/bin").mkdir(parents=True)
    root = str(Path(__file__).parents[2])
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER.format(root=root))
    quantiser = folder / "build/bin/llama-quantize"
    quantiser.write_text(QUANTISER)
    quantiser.chmod(quantiser.stat().st_mode | stat.S_IXUSR)
    return folder


@pytest.fixture
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """48 tokens are compared: llama-server is asked for each position by itself."""
    monkeypatch.setattr("layerpeel.export.verify.text.LEAST_TOKENS", 48)
    monkeypatch.setattr("layerpeel.export.verify.text.BEYOND_WINDOW", 0)


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs `layerpeel`; gives its exit code and what it wrote."""
    from tests.cli.test_cli import call

    return lambda *arguments: call(monkeypatch, capsys, *map(str, arguments))
