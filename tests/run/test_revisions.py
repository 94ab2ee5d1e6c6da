"""A run of a model on the hub keeps to the commit that it began with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from layerpeel.config.reading import parse_config
from layerpeel.errors import InputError
from layerpeel.export.student import export_student
from layerpeel.run.folder import Run
from layerpeel.run.loop import peel
from tests.families import save_texts, save_tiny
from tests.model.test_commits import FIRST, NAME, SECOND, add_commit, use_cache


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run of a model whose main branch is at its first commit."""
    use_cache(tmp_path / "hub", monkeypatch)
    add_commit(tmp_path / "hub", FIRST, save_tiny(tmp_path / "one"), "main")
    text = str(save_texts(tmp_path / "text.jsonl"))
    return {
        "teacher": NAME,
        "output": str(tmp_path / "run"),
        "stop": {"target_layers": 5},
        "score": {"decide": "teacher_kl", "text": text, "tokens": 64},
        "tasks": [{"kind": "perplexity", "data": text, "limit": 2}],
        "distill": {"sequence_length": 64, "tokens_per_round": 0},
    }


def test_the_commit_is_on_record_and_another_one_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    run = peel(parse_config(settings, "test"))
    assert run.start and run.start.teacher_files == {"commit": FIRST}
    assert run.config.revision is None and run.pinned_config.revision == FIRST
    assert f"someone/tiny as of commit `{FIRST}`" in (run.student_folder / "README.md").read_text(encoding="utf-8")
    embeddings = load_file(run.student_folder / "model.safetensors")["model.embed_tokens.weight"]
    add_commit(tmp_path / "hub", SECOND, save_tiny(tmp_path / "two", "qwen2"), "main")
    with pytest.raises(InputError, match=r"someone/tiny is another than when the run began .commit.") as caught:
        peel(parse_config(settings, "test"))
    assert f"--set revision={FIRST}" in str(caught.value.hint)
    peel(parse_config(settings | {"revision": FIRST}, "test"))  # another name of the same commit
    export_student(Run(run.folder), tmp_path / "exported", 1)
    exported = load_file(tmp_path / "exported/model.safetensors")["model.embed_tokens.weight"]
    assert exported.equal(embeddings)


def test_another_revision_is_another_run(settings: dict[str, Any], tmp_path: Path) -> None:
    peel(parse_config(settings, "test"))
    add_commit(tmp_path / "hub", SECOND, save_tiny(tmp_path / "two", "qwen2"), "next")
    with pytest.raises(InputError, match=r"holds another run: revision"):
        peel(parse_config(settings | {"revision": "next"}, "test"))
