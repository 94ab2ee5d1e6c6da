"""A digest of a text is that of the files its rows come from: it changes where these do, and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import pytest

from layerpeel.config.fields import TextConfig
from layerpeel.data.digests import digest_of_text, version_of_text
from layerpeel.data.reading import read_rows
from layerpeel.data.token_store import TokenStore
from tests.data.test_token_store import load, same


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "deeper").mkdir(parents=True)
    for name in ("_a.jsonl", "b.jsonl"):
        (folder / name).write_text('{"text": "one"}\n')
    return folder


@pytest.mark.parametrize(
    ("name", "is_read"),
    [
        ("_a.jsonl", True),
        ("b.jsonl", True),
        ("_new.jsonl", True),
        ("NEW.JSONL", True),
        ("README.md", False),
        (".new.jsonl", False),
        ("_SUCCESS", False),
        ("deeper/new.jsonl", False),
    ],
)
def test_of_a_folder_what_is_read_counts(corpus: Path, name: str, is_read: bool) -> None:
    source = TextConfig(path=str(corpus))
    rows, digest, version = list(read_rows(source.path)), digest_of_text(source), version_of_text(source)
    (corpus / name).write_text('{"text": "two"}\n')
    assert (list(read_rows(source.path)) != rows) == is_read
    assert (digest_of_text(source) != digest) == is_read
    assert (version_of_text(source) != version) == is_read


def test_kept_tokens_are_those_of_every_file_that_is_read(corpus: Path, tmp_path: Path) -> None:
    source, texts = TextConfig(path=str(corpus)), TokenStore(tmp_path / "kept")
    load([source], texts=texts)
    (corpus / "_a.jsonl").write_text('{"text": "two"}\n')
    assert same(load([source], texts=texts), load([source], texts=None))


def test_of_a_saved_dataset_all_splits_count(tmp_path: Path) -> None:
    source = TextConfig(path=str(tmp_path / "saved"))
    split = datasets.Dataset.from_dict({"text": ["a", "b"]})
    datasets.DatasetDict({"train": split, "dev": split}).save_to_disk(source.path)
    digest = digest_of_text(source)
    (tmp_path / "saved/README.md").write_text("a")
    assert digest_of_text(source) == digest
    (tmp_path / "saved/dev/data-00000-of-00001.arrow").write_bytes(b"b")
    assert digest_of_text(source) != digest


@pytest.mark.parametrize("name", ["gone.jsonl", "gone/deeper/text", "x" * 300, "gone\0.txt"])
def test_what_is_not_there_has_none(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", None)  # nor is the hub asked
    for path in (name, os.path.join(tmp_path, name)):
        assert digest_of_text(TextConfig(path=path)) is None and version_of_text(TextConfig(path=path)) is None
