"""Whatever a config, a data file or a checkpoint holds: it is read right, or refused by an `InputError`.

`make fuzz` runs this for ten minutes (FUZZ_SECONDS, for each test its share), from another seed each time.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from layerpeel.config.distill import DistillConfig
from layerpeel.config.fields import TextConfig
from layerpeel.config.reading import load_config
from layerpeel.config.run import RunConfig, TaskConfig
from layerpeel.config.score import ScoreConfig
from layerpeel.data.documents import read_documents
from layerpeel.data.reading import read_rows
from layerpeel.errors import InputError
from layerpeel.model.loading import load_model
from layerpeel.run.preflight import check_run
from layerpeel.tasks.registry import make_tasks
from layerpeel.tasks.templates import fill as fill_template
from tests.cli.test_cli import fill
from tests.families import tiny_ids, tiny_model, tiny_tokenizer
from tests.odd_inputs import CONTENTS, Table, changes_of_checkpoints, tables, tiny_checkpoint

SECONDS = float(os.environ.get("FUZZ_SECONDS", "0")) / 6
QUICK = 40  # examples of each, in the suite


def fuzz(inputs: SearchStrategy[Any], check: Callable[[Any], None], quick: int = QUICK) -> None:
    """Runs a check on inputs, and goes on while there is time."""
    phases = [Phase.generate, Phase.shrink]
    options = settings(max_examples=quick, phases=phases, suppress_health_check=list(HealthCheck), deadline=None)
    options(given(inputs)(check))()
    end, start = time.monotonic() + SECONDS, time.time_ns()
    while time.monotonic() < end:
        start += 1
        again = settings(options, max_examples=500, derandomize=False, database=None)
        seed(start)(again(given(inputs)(check)))()


WORDS = st.sampled_from(
    [
        "choice",
        "pairs",
        "generate",
        "perplexity",
        "text",
        "w5",
        "a.jsonl",
        "text.txt",
        "teacher",
        "kl",
        "*",
        "~",
        "{context}",
        "{choices[0]}",
        "{a.b}",
        "{",
        "[",
        "-1",
        "1e400",
        "8GB",
        "2.5B",
        "\0",
        "..",
        ".",
        "/",
        "\ud800",
        "\x1b[2J",
        "json:dumps",
        "nowhere:X",
        ":",
    ]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 9),
    st.floats(),
    st.text(max_size=8),
    WORDS,
    st.just(10**30),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6) | WORDS, inner, max_size=4),
    max_leaves=8,
)
FIELDS = [
    *((name,) for name in RunConfig.model_fields),
    *(("distill", name) for name in DistillConfig.model_fields),
    *(("score", name) for name in ScoreConfig.model_fields),
    *(("stop", name) for name in ("target_layers", "min_quality", "max_params", "unknown")),
    *(("distill", "text", 0, name) for name in TextConfig.model_fields),
    *(("tasks", 0, name) for name in (*TaskConfig.model_fields, "data", "limit", "prompt", "choices", "answer")),
    *(("tasks", 0, name) for name in ("num_fewshot", "stop", "fewshot_data", "metric", "good", "column", "split")),
    *(
        ("score", part, name)
        for part, name in (
            ("shortlist", "by"),
            ("shortlist", "keep"),
            ("protect", "first"),
            ("protect", "last"),
            ("protect", "layers"),
            ("heal", "steps"),
        )
    ),
    *(("distill", "losses", name) for name in ("kl", "hidden_mse", "cross_entropy")),
    ("distill", "losses", "kl", "weight"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("fuzz"))


def change(config: Any, path: tuple[Any, ...], value: Any) -> None:
    """Sets a value, where the way to it is still there."""
    for key in path[:-1]:
        if isinstance(config, dict):
            config = config.setdefault(key, {})
        elif isinstance(config, list) and isinstance(key, int) and len(config) > key:
            config = config[key]
        else:
            return
    if isinstance(config, dict):
        config[path[-1]] = value


def try_config(path: Path) -> None:
    try:
        check_run(load_config(path))
    except InputError as error:
        assert str(error) and error.hint


def test_configs_with_any_values(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    base = yaml.safe_load((folder / "run.yaml").read_text())
    base["distill"]["text"] = [{"path": "text.txt"}]

    def check(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
        config = copy.deepcopy(base)
        for path, value in changes:
            change(config, path, value)
        if "harness" in repr(config.get("tasks")):
            return  # the harness's index of tasks takes seconds to read
        try:
            text = yaml.safe_dump(config)
        except ValueError:  # more digits than Python writes out
            text = json.dumps(str(config.keys()))
        (folder / "fuzz.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
        try_config(folder / "fuzz.yaml")

    fuzz(st.lists(st.tuples(st.sampled_from(FIELDS), VALUES), min_size=1, max_size=3), check)


def test_texts_of_configs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    base = (folder / "run.yaml").read_bytes()
    pieces = st.sampled_from(
        [
            b"",
            b"\t",
            b"- ",
            b": ",
            b"&a ",
            b"*a",
            b"!!python/name:os.system ",
            b"!!binary x",
            b"<<: ",
            b"? ",
            b"|\n",
            b"{",
            b"}",
            b"[",
            b"]",
            b"'",
            b'"',
            b"#",
            b"%YAML 9.9\n",
            b"---\n",
            b"\xff",
            b"\x00",
            b"0x" + b"f" * 9000,
            b"9" * 5000,
            b"2001-99-99",
            b"1:99:99",
            b".nan",
        ]
    )

    def check(edits: list[tuple[int, int, bytes]]) -> None:
        text = base
        for start, length, piece in edits:
            text = text[:start] + piece + text[start + length :]
        (folder / "fuzz.yaml").write_bytes(text)
        try_config(folder / "fuzz.yaml")

    edits = st.tuples(st.integers(0, len(base)), st.integers(0, 30), pieces | st.binary(max_size=6))
    fuzz(st.lists(edits, min_size=1, max_size=4), check)


def test_rows_of_any_kind(tmp_path: Path) -> None:
    names = ["text", "context", "choices", "answer", "sentence_good", "sentence_bad", "prompt", "target", "messages"]
    rows = st.dictionaries(st.sampled_from(names) | st.text(max_size=4), VALUES, max_size=6)
    whole = st.fixed_dictionaries(
        {
            "text": st.text(max_size=9),
            "context": st.text(max_size=9),
            "choices": st.lists(st.text(max_size=5), max_size=4),
            "answer": st.integers(-1, 4) | st.sampled_from("ABCa1²"),
            "sentence_good": st.text(max_size=9),
            "sentence_bad": st.text(max_size=9),
            "prompt": st.text(max_size=9),
            "target": st.text(max_size=9),
        }
    )
    written = (rows | whole | VALUES).map(_dumped)
    broken = st.sampled_from(
        [b"{", b"[" * 9000, b'"\\ud800"', b"\xef\xbb\xbf{}", b"\xff", b'{"text": ' + b"9" * 5000 + b"}"]
    )
    tokenizer = tiny_tokenizer()
    path = tmp_path / "a.jsonl"
    kinds = ["choice", "pairs", "generate", "perplexity"]
    tasks = [{"kind": kind, "data": str(path)} for kind in kinds] + [
        {"kind": "generate", "data": str(path), "metric": "rougeL", "num_fewshot": 1},
        {"kind": "choice", "data": str(path), "num_fewshot": 1, "prompt": "{context}{choices[0]}"},
    ]

    def check(content: list[bytes]) -> None:
        others = [path.with_suffix(ending) for ending in (".json", ".csv", ".tsv", ".txt", ".NDJSON")]
        for file in (path, *others):
            file.write_bytes(b"\n".join(content))
        sources = [TextConfig(path=str(file)) for file in (path, *others)]
        for source in (*sources, TextConfig(path=str(path), messages="messages")):
            try:
                list(read_documents(source))
            except InputError as error:
                assert str(error) and error.hint
        for task in make_tasks([TaskConfig(**each) for each in tasks]):
            try:
                task.check()
                task.requests(tokenizer)
            except InputError as error:
                assert str(error) and error.hint

    fuzz(st.lists(written | broken | st.binary(max_size=12), max_size=4), check)


def test_cells_of_any_file_are_text_as_written_or_refused(tmp_path: Path) -> None:
    def check(table: Table) -> None:
        path = tmp_path / table.name
        path.write_bytes(table.content)
        try:
            rows = list(read_rows(str(path), split="test"))
        except InputError as error:
            assert str(error) and error.hint
            return
        assert len(rows) == len(table.cells)
        for row, cell in zip(rows, table.cells, strict=True):
            try:
                text = fill_template("{target}", row, "here")
            except InputError as error:
                assert str(error) and error.hint
            else:
                assert text == cell

    fuzz(tables(), check)


def test_chats_of_any_form_are_their_text_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    roles = st.sampled_from(["user", "assistant", "system", "tool", None, 3])

    def check(messages: list[tuple[Any, tuple[Any, str | None]]]) -> None:
        chat = [{"role": role, "content": content} for role, (content, _) in messages]
        path.write_text(json.dumps({"messages": chat}) + "\n")
        try:
            documents = list(read_documents(TextConfig(path=str(path), messages="messages")))
        except InputError as error:
            assert str(error) and error.hint
        else:
            assert documents == [[{"role": role, "content": text} for role, (_, text) in messages]]

    fuzz(st.lists(st.tuples(roles, CONTENTS), min_size=1, max_size=3), check)


def test_checkpoints_of_any_form_load_right_or_are_refused(tmp_path: Path) -> None:
    base, folder, ids = tiny_checkpoint(tmp_path / "teacher"), tmp_path / "teacher", tiny_ids()

    def check(changes: list[tuple[Callable[..., None], int]]) -> None:
        checkpoint = copy.deepcopy(base)
        for change, pick in changes:
            change(checkpoint, pick)
        checkpoint.write(folder)
        try:
            model, _ = load_model(folder, device="cpu")
        except InputError as error:
            assert str(error) and error.hint
            assert checkpoint.refused in (True, None), f"refused: {error}"
            return
        assert checkpoint.refused is not True, "loaded, and had to be refused"
        expected = tiny_model("llama").eval()
        expected.load_state_dict({name: tensor.float() for name, tensor in checkpoint.tensors.items()})
        with torch.no_grad():
            logits, right = model(ids).logits, expected(ids).logits
        torch.testing.assert_close(logits, right, atol=1e-4, rtol=1e-4, equal_nan=True)

    fuzz(changes_of_checkpoints, check, quick=25)


def _dumped(row: Any) -> bytes:
    try:
        return json.dumps(row).encode()
    except ValueError:  # more digits than Python writes out
        return b"0"
