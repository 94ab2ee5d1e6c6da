"""Text in every form to rows, no more of it than is asked for, and what is said of what cannot be read."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.arrow_writer import ArrowWriter

from layerpeel.config.fields import TextConfig
from layerpeel.data import reading
from layerpeel.data.digests import digest_of_text
from layerpeel.data.documents import read_documents
from layerpeel.data.reading import is_hub_text, read_rows
from layerpeel.errors import InputError


def documents(path: Path | str, **options: str) -> list[str]:
    return list(read_documents(TextConfig(path=str(path), **options)))


def input_error(path: Path | str, **options: str) -> tuple[str, str | None]:
    with pytest.raises(InputError) as caught:
        documents(path, **options)
    return str(caught.value), caught.value.hint


def test_text_files(tmp_path: Path) -> None:
    single, several = tmp_path / "whole.txt", tmp_path / "several.txt"
    single.write_text("one\n\ntwo\n", encoding="utf-8")
    several.write_text("one\n<|endoftext|>\nдва\nстроки\n<|endoftext|>\n\n<|endoftext|>\n", encoding="utf-8")
    assert documents(single) == ["one\n\ntwo"]
    assert documents(several) == ["one", "два\nстроки"]
    assert list(read_rows(str(several))) == [{"text": "one"}, {"text": "два\nстроки"}]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert documents(path) == ["hello"]


def test_tables_and_folders(tmp_path: Path) -> None:
    rows = [{"story": "a"}, {"story": "b"}]
    (tmp_path / "1.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "2.parquet")
    (tmp_path / "3.json").write_text(json.dumps(rows))
    for name in ("1.jsonl", "2.parquet", "3.json"):
        assert documents(tmp_path / name, column="story") == ["a", "b"]
    assert documents(tmp_path, column="story") == ["a", "b"] * 3
    assert documents(tmp_path / "[12].*", column="story") == ["a", "b"] * 2


@pytest.mark.parametrize("name", ["a [1].csv", "a.arrow", "a.json"])
def test_tables_of_all_kinds_and_names(tmp_path: Path, name: str) -> None:
    table = datasets.Dataset.from_list([{"text": "a", "n": 1}, {"text": "b", "n": 2}])
    if name.endswith(".arrow"):
        table.save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(tmp_path / name)
    else:
        (table.to_csv if name.endswith("csv") else table.to_json)(tmp_path / name)
    first, second = ("1", "2") if name.endswith("csv") else (1, 2)  # the cells of a .csv are text
    assert list(read_rows(str(tmp_path / name))) == [{"text": "a", "n": first}, {"text": "b", "n": second}]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", "a\n<|endoftext|>\nb"), ("a.jsonl", '{"text": "a"}\n{"text": "b"}'), ("a.csv", "text\na\nb\n")],
)
def test_gzipped_files(tmp_path: Path, name: str, content: str) -> None:
    with gzip.open(tmp_path / f"{name}.gz", "wt") as file:
        file.write(content)
    assert documents(tmp_path / f"{name}.gz") == documents(tmp_path) == ["a", "b"]


def test_tables_are_read_a_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parquet file of many row groups, of which the last are damaged: the first rows come all the same."""
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list([{"text": f"{i} " + "x" * 999} for i in range(4000)]).to_parquet(path, batch_size=100)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20000] = b"\xff" * 20000
    path.write_bytes(content)
    assert [row["text"][:2] for row in islice(read_rows(str(path)), 3)] == ["0 ", "1 ", "2 "]
    with pytest.raises(InputError, match=r"a\.parquet: cannot be read"):
        list(read_rows(str(path)))


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is taken to answer; nothing is asked of it."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(reading, "use_cache_without_hub", lambda: None)


def test_hub_datasets_are_streamed_or_from_the_cache(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def load(path: str, name: str | None, *, split: str, streaming: bool = False) -> Iterator[dict[str, str]]:
        calls.append((path, name, split, streaming))
        return iter([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert documents("owner/set", name="en", split="dev") == ["a", "b"]
    assert list(read_rows("owner/whole")) == [{"text": "a"}, {"text": "b"}]
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert documents("owner/cached") == ["a", "b"]
    assert calls == [
        ("owner/set", "en", "dev", True),
        ("owner/whole", None, "train", False),  # tasks read all of their rows, and again in the next run
        ("owner/cached", None, "train", False),
    ]


def test_a_hub_that_fails_is_said_and_nothing_more_is_fetched(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(path: str, name: str | None, *, split: str, streaming: bool = False) -> Iterator[dict[str, str]]:
        calls.append(streaming)
        raise OSError("503 Server Error:\nService Unavailable")

    monkeypatch.setattr(datasets, "load_dataset", load)
    text, hint = input_error("owner/set")
    assert text == (
        "owner/set: neither a file here nor a dataset that can be loaded from the hub "
        "(503 Server Error: Service Unavailable)"
    )
    assert hint and "the network" in hint and calls == [True]


def cache_commit(root: Path, commit: str, texts: list[str], subset: str = "default") -> None:
    """Puts a commit of owner/MySet into a cache as `datasets` leaves it."""
    folder = root / "owner___my_set" / subset / "0.0.0" / commit
    folder.mkdir(parents=True)
    with ArrowWriter(path=str(folder / "my_set-train.arrow")) as writer:
        for text in texts:
            writer.write({"text": text})
        examples, size = writer.finalize()
    split = {"name": "train", "num_bytes": size, "num_examples": examples, "dataset_name": "my_set"}
    datasets.DatasetInfo(
        builder_name="parquet", dataset_name="my_set", config_name=subset, version="0.0.0", splits={"train": split}
    ).write_to_directory(str(folder))


def test_without_a_network_the_digest_is_the_commit_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    commits = {f"{number:040x}": f"text of {number}" for number in (3, 1, 2)}

    def commit_read(**options: Any) -> str:
        (text,) = documents("owner/MySet", **options)
        return next(commit for commit, content in commits.items() if content == text)

    assert digest_of_text(TextConfig(path="owner/MySet")) is None
    for age, (commit, text) in enumerate(commits.items()):
        cache_commit(tmp_path, commit, [text], "en" if text.endswith("2") else "default")
        folder = next(tmp_path.glob(f"*/*/*/{commit}"))
        os.utime(folder, (10**9 + age, 10**9 + age))
        assert digest_of_text(TextConfig(path="owner/MySet")) == commit == commit_read()
    assert digest_of_text(TextConfig(path="owner/MySet", name="default")) == commit_read(name="default") == f"{1:040x}"
    assert digest_of_text(TextConfig(path="owner/Another")) is None


def test_saved_datasets(tmp_path: Path) -> None:
    split = datasets.Dataset.from_dict({"text": ["a", "b"]})
    split.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": split, "dev": split.select([1])}).save_to_disk(tmp_path / "dict")
    assert documents(tmp_path / "one") == ["a", "b"]
    assert documents(tmp_path / "dict", split="dev") == ["b"]
    assert input_error(tmp_path / "dict", split="test") == (
        f"{tmp_path / 'dict'}: no split 'test'",
        "splits there: train, dev",
    )


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", b"", "{path}: the file is empty"),
        ("a.txt", b"ab\ncd\xffe", "{path}: not UTF-8 (byte 5)"),
        ("a.jsonl", b'{"text": "\xff"}', "{path}: not UTF-8 (byte 10)"),
        (
            "a.jsonl",
            b'{"text": "a"}\n\n{"text"\n',
            "{path}, line 3: not JSON (Expecting ':' delimiter: line 2 column 1 (char 8))",
        ),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "{path}, line 2: expected a JSON object, found list"),
        ("a.jsonl", b'{"story": "a", "n": 1}\n', "{path}, line 1: no column 'text'"),
        ("a.jsonl", b'{"text": 5}\n', "{path}, line 1: column 'text' holds int, expected text"),
        ("a.jsonl", b'{"text": " "}\n{"text": ""}\n', "{path}: no text in it"),
        ("a.parquet", b"nothing", "{path}: cannot be read (Parquet file size is 7 bytes"),
        ("a.arrow", b"nothing", "{path}: cannot be read ("),
        ("a.json", b"nothing", "{path}: not JSON (Expecting value: line 1 column 1 (char 0))"),
        (
            "a.json",
            b'{"version": 1, "data": [{"text": "a"}]}',
            "{path}: one object of version, data, expected a list of objects, or one object a line",
        ),
        ("a.json", b'{"text":\n"a"}\n', "{path}: one object of text, expected a list of objects, or one object a line"),
        ("a.json", b'[{"text": "a"}, ["b"]]', "{path}, row 2: expected a JSON object, found list"),
        ("a.json", b'"text"', "{path}: str, expected a list of objects"),
        ("a.json", b'{"text": "a"}\n{"text": }\n', "{path}, line 2: not JSON ("),
        ("a.jsonl", b'{"text": "a", "text": "b"}', "{path}, line 1: not JSON (an object has the key 'text' twice)"),
        ("a.csv", b'text\nb\n"a\n', "{path}, line 3: not CSV (unexpected end of data)"),
        ("a.tsv", b'text\tn\n"a" b\t1\n', "{path}, line 2: not TSV ('\t' expected after '\"')"),
        ("a.csv", b"text,n,text\na,1,b\n", "{path}, line 1: two columns are called 'text'"),
        ("a.csv", b'text,n\n"a\nb",1\nc\n', "{path}, line 4: 1 cells, expected 2 as in the first line"),
        ("a.csv", b"text,n\na,1,2\n", "{path}, line 2: 3 cells, expected 2 as in the first line"),
        ("a.csv", b"text\n", "{path}: no text in it"),
        ("a.txt", "text".encode("utf-16"), "{path}: UTF-16 or UTF-32, expected UTF-8"),
        ("a.csv", "text\na".encode("utf-16-le"), "{path}: UTF-16 or UTF-32, expected UTF-8"),
        ("a.json", "[1]".encode("utf-32"), "{path}: UTF-16 or UTF-32, expected UTF-8"),
        ("a.txt", b"\xef\xbb\xbfab\xff", "{path}: not UTF-8 (byte 5)"),
        ("a.md", b"# a", "{path}: files that end in .md are not read"),
        ("a.jsonl.bak", b"{}", "{path}: files that end in .bak are not read"),
        ("a", b"text", "{path}: a file without an ending is not read"),
        ("a.gz", b"text", "{path}: a file without an ending is not read"),
        ("a.xlsx.GZ", b"text", "{path}: files that end in .xlsx are not read"),
        ("a.txt.gz", b"nothing", "{path}: cannot be read (Not a gzipped file (b'no'))"),
        ("a.txt.gz", gzip.compress(b"text", mtime=0)[:-9], "{path}: cannot be read (Compressed file ended"),
        ("a.json.gz", b"nothing", "{path}: cannot be read ("),
        ("a.jsonl.zst", b"nothing", "{path}: .zst files are not read"),
        ("a.jsonl", gzip.compress(b"text", mtime=0), "{path}: packed by gzip"),
        ("a.tar.gz", b"nothing", "{path}: .tar files are not read"),
    ],
)
def test_what_is_said_of_a_file(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    text, hint = input_error(path)
    assert hint and text.startswith(expected.format(path=path)), text
    assert "\n" not in text


def test_what_is_said_of_a_damaged_saved_dataset(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "one")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"nothing")
    text, hint = input_error(tmp_path / "one")
    assert text.startswith(f"{tmp_path / 'one'}: this saved dataset cannot be read (")
    assert hint == "save it again with save_to_disk"


def test_what_is_said_of_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"story": "a", "n": 1}\n')
    assert input_error(tmp_path / "a.jsonl")[1] == "columns there: story, n"


def test_what_is_said_of_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    (tmp_path / "empty" / "deeper" / "a.txt").write_text("a")
    (tmp_path / "empty" / "README.md").write_text("a")
    assert input_error(tmp_path / "a.txt")[0] == f"no such file: {tmp_path / 'a.txt'}"
    assert input_error(tmp_path / "*.txt")[0] == f"no file matches {tmp_path / '*.txt'}"
    assert input_error("data/deeper/set") == (
        "no such file: data/deeper/set",
        "check the path; it is taken from the config's folder first; a hub dataset is named owner/name",
    )
    assert input_error(tmp_path / "empty")[0] == f"{tmp_path / 'empty'}: nothing to read in this folder"


def test_what_is_said_of_a_hub_dataset_out_of_reach() -> None:
    text, hint = input_error("nobody/nothing-of-this-name")  # conftest keeps the hub offline
    assert text.startswith("nobody/nothing-of-this-name: neither a file here nor a dataset that can be loaded")
    assert hint is not None and "network" in hint


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("mlfoundations/dclm-baseline-1.0", True),
        ("squad", True),
        ("owner/set", True),
        ("owner/set.jsonl", False),
        ("set.JSONL.gz", False),
        ("data/*.parquet", False),
        ("data/deeper/set", False),
        ("./set", False),
        ("/data/set", False),
        ("~/set", False),
        ("C:\\data\\set", False),
        ("here/folder", False),
        ("here/file", False),
    ],
)
def test_which_paths_are_names_of_hub_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, expected: bool
) -> None:
    (tmp_path / "here/folder").mkdir(parents=True)
    (tmp_path / "here/file").touch()
    monkeypatch.chdir(tmp_path)
    assert is_hub_text(path) == expected
