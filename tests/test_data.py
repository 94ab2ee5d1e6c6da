"""Text in every form to rows of tokens, and what is said of what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from layerpeel.config import TextConfig
from layerpeel.data import Rows, cycle_batches, load_rows, mix_documents, read_documents, read_rows
from layerpeel.errors import InputError


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; 256 ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


def documents(path: Path | str, **options: str) -> list[str]:
    return list(read_documents(TextConfig(path=str(path), **options)))


def said(path: Path | str, **options: str) -> tuple[str, str | None]:
    with pytest.raises(InputError) as caught:
        documents(path, **options)
    return str(caught.value), caught.value.hint


def test_text_files(tmp_path: Path) -> None:
    whole, several = tmp_path / "whole.txt", tmp_path / "several.txt"
    whole.write_text("one\n\ntwo\n", encoding="utf-8")
    several.write_text("one\n<|endoftext|>\nдва\nстроки\n<|endoftext|>\n\n<|endoftext|>\n", encoding="utf-8")
    assert documents(whole) == ["one\n\ntwo"]
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


def test_saved_datasets(tmp_path: Path) -> None:
    split = datasets.Dataset.from_dict({"text": ["a", "b"]})
    split.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": split, "dev": split.select([1])}).save_to_disk(tmp_path / "dict")
    assert documents(tmp_path / "one") == ["a", "b"]
    assert documents(tmp_path / "dict", split="dev") == ["b"]
    assert said(tmp_path / "dict", split="test") == (
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
        ("a.jsonl", b'{"story": "a", "n": 1}\n', "{path}: no column 'text'"),
        ("a.jsonl", b'{"text": 5}\n', "{path}: column 'text' holds int, expected text"),
        ("a.parquet", b"nothing", "{path}: cannot be read ("),
    ],
)
def test_what_is_said_of_a_file(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    text, hint = said(path)
    assert hint and text.startswith(expected.format(path=path))


def test_what_is_said_of_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"story": "a", "n": 1}\n')
    assert said(tmp_path / "a.jsonl")[1] == "columns there: story, n"


def test_what_is_said_of_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert said(tmp_path / "a.txt")[0] == f"no such file: {tmp_path / 'a.txt'}"
    assert said(tmp_path / "*.txt")[0] == f"no file matches {tmp_path / '*.txt'}"
    assert said(tmp_path / "empty")[0] == f"{tmp_path / 'empty'}: nothing to read in this folder"


def test_what_is_said_of_a_hub_dataset_out_of_reach() -> None:
    text, hint = said("nobody/nothing-of-this-name")  # conftest keeps the hub offline
    assert text.startswith("nobody/nothing-of-this-name: neither a file here nor a dataset that can be loaded")
    assert hint is not None and "network" in hint


def test_mixing_is_fair_complete_and_repeatable(tmp_path: Path) -> None:
    sources = []
    for name, count in (("a", 300), ("b", 100)):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(count))
        )
        sources.append(TextConfig(path=str(tmp_path / f"{name}.jsonl")))
    mixed = list(mix_documents(sources, seed=1))
    assert sorted(mixed) == sorted([f"a{i}" for i in range(300)] + [f"b{i}" for i in range(100)])
    assert 15 <= sum(text.startswith("b") for text in mixed[:60]) <= 45
    assert [text for text in mixed if text[0] == "a"] == [f"a{i}" for i in range(300)]
    assert mixed == list(mix_documents(sources, seed=1)) != list(mix_documents(sources, seed=2))


def text_file(folder: Path, *texts: str) -> list[TextConfig]:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [TextConfig(path=str(folder / "a.jsonl"))]


def test_packed_rows_are_the_stream_cut(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["hello", "a much longer document, over several rows", "x"]
    rows = load_rows(text_file(tmp_path, *texts), tokenizer, sequence_length=8)
    stream = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_token_id]]
    assert rows.input_ids.flatten().tolist() == stream[: len(stream) // 8 * 8]
    assert rows.input_ids.shape == rows.mask.shape == (len(stream) // 8, 8)
    assert rows.mask.all()


def test_unpacked_rows_are_documents(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = load_rows(text_file(tmp_path, "ab", "a longer one"), tokenizer, sequence_length=5, packing=False)
    end = tokenizer.eos_token_id
    assert rows.input_ids.tolist() == [[*tokenizer.encode("ab"), end, end, end], tokenizer.encode("a lon")]
    assert rows.mask.sum(1).tolist() == [3, 5]
    batch = rows.take(torch.tensor([0]))
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0]]


def test_tokens_asked_for_bound_the_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    sources = text_file(tmp_path, "x" * 100)
    assert len(load_rows(sources, tokenizer, sequence_length=8, max_tokens=39)) == 4
    assert len(load_rows(sources, tokenizer, sequence_length=8, max_tokens=1)) == 1


def test_no_more_is_read_than_asked_for(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    sources = text_file(tmp_path, *["x" * 50] * 1000)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("not JSON\n")
    assert len(load_rows(sources, tokenizer, sequence_length=8, max_tokens=80)) == 10


def test_too_little_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    sources = text_file(tmp_path, "short")
    with pytest.raises(InputError, match=r"a\.jsonl: not one row of 256 tokens of text$"):
        load_rows(sources, tokenizer, sequence_length=256)


def test_cycles_show_every_row_as_often() -> None:
    rows = Rows(torch.arange(6)[:, None], torch.ones(6, 1, dtype=torch.bool))
    seen = [batch["input_ids"].flatten().tolist() for batch in cycle_batches(rows, 2, seed=3, steps=6)]
    flat = [row for batch in seen for row in batch]
    assert sorted(flat[:6]) == sorted(flat[6:]) == list(range(6))
    assert flat[:6] != flat[6:]
    again = cycle_batches(rows, 2, seed=3, steps=6)
    assert [batch["input_ids"].flatten().tolist() for batch in again] == seen
    assert len(list(cycle_batches(rows, 4, seed=0, steps=5))) == 5
