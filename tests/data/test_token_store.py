"""Text that is kept as token ids gives the rows of text that is read anew, and is read and tokenised once."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from layerpeel.config.distill import Packing
from layerpeel.config.fields import TextConfig
from layerpeel.data import token_store, tokenizing
from layerpeel.data.batches import ROWS_AHEAD, load_rows
from layerpeel.data.documents import PlacedDocument
from layerpeel.data.rows import Rows
from layerpeel.data.token_documents import (
    TokenText,
    find_token_text,
    read_documents_in,
    vocabulary_digest,
    write_documents,
)
from layerpeel.data.token_store import TokenStore
from layerpeel.data.tokenizing import DOCUMENTS_PER_CALL, read_tokens
from layerpeel.errors import InputError, RunError
from layerpeel.processes.distributed import RANK, is_main_process, processes_of
from layerpeel.processes.interrupts import Interrupted, interruptible
from tests.data.test_batches import PACKINGS
from tests.families import byte_tokenizer
from tests.launching import launch

MakeSource = Callable[..., TextConfig]


MAPS = Path("/proc/self/maps")


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_store, "SHARD", 100)


@pytest.fixture
def sources(make_source: MakeSource) -> list[TextConfig]:
    """Two sources of 120 documents each, mixed by weight and shuffled."""
    return [
        make_source([letter * (number % 9 + 1) for number in range(120)], weight=weight, shuffle=10)
        for letter, weight in (("a", 1.0), ("b", 2.5))
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "text"


def load(
    sources: list[TextConfig], tokens: int | None = 300, skip: int = 0, *, texts: TokenStore | None, **options: Any
) -> Rows:
    options = {"tokenizer": byte_tokenizer(), "sequence_length": 8, "seed": 3, **options}
    return load_rows(sources, max_tokens=tokens, skip_tokens=skip, texts=texts, **options)


def same(one: Rows, other: Rows) -> bool:
    pairs = [(one.input_ids, other.input_ids), (one.mask, other.mask), (one.document, other.document)]
    return all(torch.equal(*pair) for pair in pairs)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("tokens-*/*.safetensors")}


def tokens_in(folder: Path) -> int:
    kept = [read_documents_in(path) for path in folder.glob("tokens-*/*.safetensors")]
    return sum(len(ids) for each in kept if each for ids in each[0])


def no_text(*_: Any) -> Iterator[PlacedDocument]:
    raise AssertionError("text is read")


def counted(patch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are tokenised from here on."""
    texts: list[str] = []
    encode = tokenizing._encode_all

    def count(chunk: list[str], *others: Any) -> list[list[int]]:
        texts.extend(chunk)
        return encode(chunk, *others)

    patch.setattr(tokenizing, "_encode_all", count)
    return texts


@pytest.mark.parametrize("packing", PACKINGS)
def test_kept_text_gives_the_rows_of_text_that_is_read_anew(
    sources: list[TextConfig], folder: Path, packing: Packing
) -> None:
    total = sum(map(len, read_tokens(sources, byte_tokenizer(), 3)))
    for tokens, skip in [(40, 0), (300, 0), (300, 307), (1, 0), (500, total - 90), (300, 2 * total + 11), (None, 50)]:
        rows = load(sources, tokens, skip, texts=TokenStore(folder), packing=packing)
        assert same(rows, load(sources, tokens, skip, texts=None, packing=packing))
    assert len(files_of(folder)) > 5 and tokens_in(folder) == total


def test_no_text_is_read_twice_and_no_more_than_is_wanted(
    sources: list[TextConfig], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (load(sources, 300, skip, texts=None) for skip in (0, 300))
    wanted = 600 + ROWS_AHEAD * 8
    texts = TokenStore(folder)
    texts.reader(sources, byte_tokenizer(), 3, wanted)
    assert wanted <= tokens_in(folder) < wanted + 10
    kept = files_of(folder)
    with monkeypatch.context() as patch:
        patch.setattr(tokenizing, "mix_documents", no_text)
        for store in (texts, TokenStore(folder)):  # this process, and another one
            assert same(load(sources, texts=store), first) and same(load(sources, 300, 300, texts=store), second)
        assert files_of(folder) == kept
        with pytest.raises(AssertionError, match="text is read"):
            load(sources, 700, texts=texts)
    assert same(load(sources, None, texts=TokenStore(folder)), load(sources, None, texts=None))
    assert kept.items() < files_of(folder).items()  # the rest came behind them


@pytest.mark.skipif(not MAPS.is_file(), reason="needs /proc")
def test_ids_are_mapped_into_memory(sources: list[TextConfig], folder: Path) -> None:
    read = TokenStore(folder).reader(sources, byte_tokenizer(), 3, 200)
    (path,) = folder.glob("tokens-*/0.safetensors")
    assert str(path) not in MAPS.read_text()
    document = next(read())
    assert str(path) in MAPS.read_text() and len(document)


def test_more_text_is_tokenised_from_where_it_stopped(
    sources: list[TextConfig], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = counted(monkeypatch)
    monkeypatch.setattr(tokenizing, "DOCUMENTS_PER_CALL", 1)
    monkeypatch.setattr(tokenizing, "MOST_THREADS", 1)
    for tokens in (200, 400, 2000):
        TokenStore(folder).reader(sources, byte_tokenizer(), 3, tokens)
    ahead = 3  # that were tokenised ahead, and not used
    assert len(texts) <= 240 + ahead
    marker = find_token_text(next(folder.iterdir()))
    assert marker and marker.documents == 240 and marker.tokens == tokens_in(folder)
    assert marker.files.keys() == files_of(folder).keys()


@pytest.mark.parametrize("calls", [0, 1, 4])
def test_a_text_that_was_broken_off_goes_on(
    sources: list[TextConfig], folder: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    left = calls

    def dies(path: Path, documents: Any) -> str:
        nonlocal left
        left -= 1
        if left < 0:
            (path.parent / f".{path.name}.1.partial").write_bytes(b"half of it")
            raise Killed
        return write_documents(path, documents)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(token_store, "write_documents", dies)
        load(sources, None, texts=TokenStore(folder))
    kept = files_of(folder)
    assert len([name for name in kept if not name.startswith(".")]) == calls
    assert same(load(sources, None, texts=TokenStore(folder)), load(sources, None, texts=None))
    assert kept.items() <= files_of(folder).items()


def test_a_stop_keeps_what_is_there(sources: list[TextConfig], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise Interrupted(15)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(token_store, "stop_if_asked", stop)
        load(sources, None, texts=TokenStore(folder))
    assert len(files_of(folder)) == 1
    assert same(load(sources, None, texts=TokenStore(folder)), load(sources, None, texts=None))


@pytest.mark.parametrize("damage", ["flipped", "gone", "marker"])
def test_what_is_damaged_is_written_anew(sources: list[TextConfig], folder: Path, damage: str) -> None:
    texts, tokenizer = TokenStore(folder), byte_tokenizer()
    whole = load(sources, None, texts=texts, tokenizer=tokenizer)
    paths = sorted(folder.glob("tokens-*/*.safetensors"), key=lambda path: int(path.stem))
    if damage == "flipped":
        content = bytearray(paths[2].read_bytes())
        content[-1] ^= 1
        paths[2].write_bytes(content)
    elif damage == "gone":
        paths[2].unlink()
    else:
        (paths[0].parent / "tokens.json").write_text("{")
    if damage != "marker":  # that is written again at once
        with pytest.raises(RunError, match="damaged or gone") as error:
            load(sources, None, texts=texts, tokenizer=tokenizer)
        assert "run the same command again" in str(error.value.hint)
    assert same(load(sources, None, texts=TokenStore(folder)), whole)


def test_files_of_other_lengths_are_no_danger(
    sources: list[TextConfig], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load(sources, None, texts=TokenStore(folder))
    (first,) = folder.glob("tokens-*/0.safetensors")
    first.unlink()
    monkeypatch.setattr(token_store, "SHARD", 37)  # what is missing becomes other files than it was
    assert same(load(sources, None, texts=TokenStore(folder)), whole)


def test_another_text_or_tokenizer_or_seed_has_a_folder_of_its_own(
    make_source: MakeSource, folder: Path, tmp_path: Path
) -> None:
    source = make_source([{"text": "ab", "other": "cd"}] * 9)
    other_end = byte_tokenizer()
    other_end.eos_token = "a"

    def folders_after(source: TextConfig, **options: Any) -> int:
        for _ in range(2):
            assert same(load([source], texts=TokenStore(folder), **options), load([source], texts=None, **options))
        return len(list(folder.iterdir()))

    assert folders_after(source) == 1
    assert folders_after(source, seed=4) == 2
    assert folders_after(source, tokenizer=other_end) == 3
    assert folders_after(source.model_copy(update={"column": "other"})) == 4
    moved = tmp_path / "moved" / Path(source.path).name
    moved.parent.mkdir()
    Path(source.path).rename(moved)
    source.path = str(moved)
    assert folders_after(source) == 4  # the same file in another place
    os.utime(moved, ns=(1, 1))
    assert folders_after(source) == 5
    moved.write_text('{"text": "ef"}\n')
    os.utime(moved, ns=(1, 1))
    assert folders_after(source) == 6


def test_what_nobody_asked_for_is_removed(make_source: MakeSource, folder: Path) -> None:
    for seed in range(3):
        load([make_source(["ab"])], seed=seed, texts=TokenStore(folder))
    (folder / "teacher-0").mkdir()
    texts = TokenStore(folder)
    load([make_source(["cd"])], texts=texts)
    texts.remove_unused()
    assert len(list(folder.glob("tokens-*"))) == 1
    texts.clear()
    assert [path.name for path in folder.iterdir()] == ["teacher-0"]
    (folder / "teacher-0").rmdir()
    texts.clear()
    assert not folder.exists()


def test_what_is_token_ids_already_or_may_change_unseen_is_not_kept(
    make_source: MakeSource, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tmp_path / "teacher-0"
    ids.mkdir()
    checksum = write_documents(ids / "0.safetensors", [[1, 2], [3]])
    TokenText(2, 3, vocabulary_digest(byte_tokenizer()), {"0.safetensors": checksum}).write(ids)
    written, files = TextConfig(path=str(ids)), make_source(["ab", "cd"])
    assert same(load([written], texts=TokenStore(folder)), load([written], texts=None))
    assert not folder.exists()
    assert same(load([written, files], texts=TokenStore(folder)), load([written, files], texts=None))
    assert len(files_of(folder)) == 1  # beside text, ids are kept in their order
    monkeypatch.setattr(token_store, "version_of_text", lambda source: None)  # as of a hub dataset without a commit
    other = make_source(["ef"])
    assert same(load([other], texts=TokenStore(folder)), load([other], texts=None))
    assert len(files_of(folder)) == 1


def test_what_is_wrong_with_text_is_said_when_it_is_reached(make_source: MakeSource, folder: Path) -> None:
    many = 8 * DOCUMENTS_PER_CALL  # more than is read ahead
    source = make_source([*(["ab"] * many), {"text": 3}])
    for texts in (None, TokenStore(folder), TokenStore(folder)):
        assert load([source], 9, texts=texts).tokens >= 9
        with pytest.raises(InputError, match=f"line {many + 1}: column 'text' holds int"):
            load([source], None, texts=texts)


@pytest.mark.slow
def test_one_process_tokenises_for_both_and_errors_reach_both(sources: list[TextConfig], tmp_path: Path) -> None:
    paths = [source.path for source in sources]
    (tmp_path / "bad.jsonl").write_text('{"text": "ab"}\n{"text": 3}\n')
    launch("-m", "tests.data.test_token_store", str(tmp_path), *paths)
    read = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert read[0] == read[1]
    expected = load([TextConfig(path=path) for path in paths], 400, 100, texts=None)
    assert read[0]["ids"] == expected.input_ids.tolist()
    assert re.search("line 2: column 'text' holds int", read[0]["error"]) and read[0]["stop"] == 15


def _worker(folder: Path, *paths: str) -> None:
    """Reads a text, then one that cannot be read, then one at which a stop is asked of the main process."""
    processes_of(torch.device("cpu"))
    if not is_main_process():
        tokenizing.mix_documents = no_text
    sources, texts = [TextConfig(path=path) for path in paths], TokenStore(folder / "text")
    ids = load(sources, 400, 100, texts=texts).input_ids.tolist()
    with pytest.raises(InputError) as error:
        load([TextConfig(path=str(folder / "bad.jsonl"))], texts=texts)
    if is_main_process():
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted) as stop:
        load(sources, seed=4, texts=texts)
    result = {"ids": ids, "error": str(error.value), "stop": stop.value.signal}
    (folder / f"{RANK}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    with interruptible():
        _worker(Path(sys.argv[1]), *sys.argv[2:])
