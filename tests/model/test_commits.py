"""A model of the hub is read at one commit, which is known; here in a cache made by hand, without a network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from layerpeel.config.run import RunConfig
from layerpeel.errors import InputError
from layerpeel.model.digests import digests, fingerprint
from layerpeel.model.loading import load_model
from layerpeel.model.origin import origin_of
from layerpeel.model.removal import remove_from_files
from layerpeel.model.streaming import load_streamed
from tests.families import save_tiny, tiny_ids

NAME, FIRST, SECOND = "someone/tiny", "1" * 40, "2" * 40


def add_commit(cache: Path, commit: str, source: Path, *refs: str) -> None:
    """Puts a model into a hub's cache, as one commit."""
    repository = cache / "models--someone--tiny"
    shutil.copytree(source, repository / "snapshots" / commit)
    for ref in refs:
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(commit)


def use_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two commits of a model: llama, tagged v1, and qwen2, which is main."""
    cache = tmp_path / "hub"
    add_commit(cache, FIRST, save_tiny(tmp_path / "one"), "v1")
    add_commit(cache, SECOND, save_tiny(tmp_path / "two", "qwen2"), "main")
    use_cache(cache, monkeypatch)
    return tmp_path


@pytest.mark.parametrize(
    ("revision", "commit", "family"),
    [(None, SECOND, "qwen2"), ("main", SECOND, "qwen2"), ("v1", FIRST, "llama"), (FIRST, FIRST, "llama")],
)
def test_the_revision_that_is_asked_for_is_read(hub: Path, revision: str | None, commit: str, family: str) -> None:
    assert digests(NAME, revision) == {"commit": commit}
    model, _ = load_model(NAME, device="cpu", revision=revision)
    expected = load_model(hub / ("one" if family == "llama" else "two"), device="cpu")[0](tiny_ids()).logits
    assert model.config.model_type == family and torch.equal(model(tiny_ids()).logits, expected)
    assert load_streamed(NAME, device="cpu", revision=revision)[0].model.config.model_type == family
    assert origin_of(NAME, revision=revision).folder.name == commit
    remove_from_files(NAME, [2], hub / "student", revision=revision)
    assert load_model(hub / "student", device="cpu")[0].config.model_type == family


def test_another_commit_is_another_teacher(hub: Path) -> None:
    assert (
        fingerprint(NAME, torch.float32)
        == fingerprint(NAME, torch.float32, SECOND)
        == fingerprint(NAME, torch.float32, "main")
    )
    assert fingerprint(NAME, torch.float32) != fingerprint(NAME, torch.float32, "v1")


def test_a_revision_that_is_not_there_is_refused(hub: Path) -> None:
    for read in (load_model, load_streamed, digests):
        with pytest.raises(InputError, match="no such model: someone/tiny at revision v3") as caught:
            read(NAME, revision="v3")
        assert "revision" in str(caught.value.hint)


def test_a_folder_has_no_revision(hub: Path) -> None:
    with pytest.raises(InputError, match=r"revision: v1, but .*one is a folder"):
        load_model(hub / "one", device="cpu", revision="v1")


def test_a_revision_is_not_empty() -> None:
    with pytest.raises(ValueError, match="revision"):
        RunConfig.model_validate({"teacher": NAME, "output": "x", "stop": {"target_layers": 1}, "revision": ""})
