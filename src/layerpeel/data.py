"""Text in any form that a user has, to token batches; and the one reader of rows that tasks use too."""

from __future__ import annotations

import glob
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from layerpeel.config import TextConfig
from layerpeel.errors import InputError

SEPARATOR = "<|endoftext|>"  # between the documents of a .txt file
TABLES = {".json": "json", ".parquet": "parquet", ".csv": "csv"}
DOCUMENTS_PER_CALL = 512


def read_rows(path: str, *, split: str = "train", name: str | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a file, folder, glob, saved dataset or hub dataset, as dicts.

    A .txt file gives rows with one column, `text`: its documents.

    Raises:
        InputError: it is missing, empty, or not what its name says; the message names the place.
    """
    files = expand(path)
    if len(files) > 1:
        for file in files:
            yield from read_rows(file, split=split)
        return
    (path,) = files
    if Path(path).is_dir():
        yield from _read_folder(Path(path), split)
    elif Path(path).is_file():
        yield from _read_file(Path(path))
    elif Path(path).suffix in (".txt", ".jsonl", *TABLES) or path.startswith((".", "/", "~")):
        raise InputError(f"no such file: {path}", hint="check the path; it is taken from the config's folder first")
    else:
        yield from _read_hub(path, split, name)


def expand(path: str) -> list[str]:
    """The files that a glob names, sorted; a path that is no glob stands for itself.

    Raises:
        InputError: no file matches.
    """
    if Path(path).exists() or not glob.has_magic(path):
        return [path]
    files = sorted(glob.glob(path))
    if not files:
        raise InputError(f"no file matches {path}", hint="check the path; it is taken from the config's folder first")
    return files


def column_of(row: dict[str, Any], column: str, where: str) -> Any:
    """A row's value in a column.

    Args:
        where: what the message of an error begins with.

    Raises:
        InputError: the column is absent; those present are named.
    """
    if column not in row:
        raise InputError(f"{where}: no column '{column}'", hint=f"columns there: {', '.join(map(str, row)) or 'none'}")
    return row[column]


def text_of(row: dict[str, Any], column: str, where: str) -> str:
    """A row's text in a column.

    Raises:
        InputError: the column is absent, or holds something other than text.
    """
    text = column_of(row, column, where)
    if not isinstance(text, str):
        raise InputError(
            f"{where}: column '{column}' holds {type(text).__name__}, expected text",
            hint=f"columns there: {', '.join(map(str, row))}",
        )
    return text


def read_documents(source: TextConfig) -> Iterator[str]:
    """The documents of one source.

    Raises:
        InputError: as `read_rows`, or the column is absent, or holds something other than text.
    """
    for row in read_rows(source.path, split=source.split, name=source.name):
        text = text_of(row, source.column, source.path)
        if text.strip():
            yield text


def mix_documents(sources: Sequence[TextConfig], seed: int) -> Iterator[str]:
    """The documents of all sources, each next one from a source drawn at random, until all are used up.

    So a beginning of the stream is a fair mixture, and the same one for the same seed.
    """
    rng = random.Random(seed)
    streams = [read_documents(source) for source in sources]
    while streams:
        stream = rng.choice(streams)
        document = next(stream, None)
        if document is None:
            streams.remove(stream)
        else:
            yield document


@dataclass
class Rows:
    """Token ids [N, T], right-padded, and where the real tokens are [N, T]."""

    input_ids: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def take(self, indices: Tensor) -> dict[str, Tensor]:
        """A batch of rows, as a model takes it."""
        return {"input_ids": self.input_ids[indices], "attention_mask": self.mask[indices].long()}


def load_rows(
    sources: Sequence[TextConfig],
    tokenizer: PreTrainedTokenizerBase,
    *,
    sequence_length: int,
    packing: bool = True,
    max_tokens: int | None = None,
    seed: int = 0,
) -> Rows:
    """Reads, mixes and tokenises text to rows of `sequence_length`, up to `max_tokens` (at least one row).

    Each document is followed by the end-of-text token. Packed rows hold one document after another, cut anywhere;
    unpacked ones hold one document each, cut or padded.

    Raises:
        InputError: there is not one row of text.
    """
    limit = None if max_tokens is None else max(1, max_tokens // sequence_length)
    ids = _token_lists(mix_documents(sources, seed), tokenizer)
    pieces = _packed(ids, sequence_length) if packing else (document[:sequence_length] for document in ids)
    rows = [torch.tensor(row) for row in islice(pieces, limit)]  # a list of ints would take four times the room
    if not rows:
        raise InputError(
            f"{', '.join(source.path for source in sources)}: not one row of {sequence_length} tokens of text",
            hint="give more text, or a smaller sequence_length",
        )
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    input_ids = torch.full((len(rows), sequence_length), padding)
    mask = torch.zeros(len(rows), sequence_length, dtype=torch.bool)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = row
        mask[index, : len(row)] = True
    return Rows(input_ids, mask)


def cycle_batches(rows: Rows, batch_size: int, *, seed: int, steps: int) -> Iterator[dict[str, Tensor]]:
    """Exactly `steps` batches, the rows shuffled anew in each pass over them, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        yield rows.take(order[:batch_size])
        order = order[batch_size:]


def _token_lists(documents: Iterator[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    while texts := list(islice(documents, DOCUMENTS_PER_CALL)):
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            yield [*ids, *end]


def _packed(documents: Iterator[list[int]], length: int) -> Iterator[list[int]]:
    held: list[int] = []
    for ids in documents:
        held += ids
        whole = len(held) - len(held) % length
        yield from (held[start : start + length] for start in range(0, whole, length))
        held = held[whole:]


def _read_folder(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        import datasets

        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise InputError(f"{folder}: no split '{split}'", hint=f"splits there: {', '.join(saved)}")
            saved = saved[split]
        yield from saved
        return
    files = sorted(path for path in folder.iterdir() if path.suffix in (".txt", ".jsonl", *TABLES))
    if not files:
        raise InputError(
            f"{folder}: nothing to read in this folder",
            hint="expected .txt, .jsonl, .json, .csv or .parquet files, or a dataset saved with save_to_disk",
        )
    for file in files:
        yield from _read_file(file)


def _read_file(path: Path) -> Iterator[dict[str, Any]]:
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty", hint="give a file with text in it")
    if path.suffix in TABLES:
        import datasets

        try:
            yield from datasets.load_dataset(TABLES[path.suffix], data_files=str(path), split="train")
        except Exception as error:
            raise InputError(f"{path}: cannot be read ({error})", hint=f"expected {path.suffix[1:]}") from None
    elif path.suffix == ".jsonl":
        yield from _read_jsonl(path)
    else:
        yield from ({"text": document} for document in _read_text(path))


def _read_text(path: Path) -> Iterator[str]:
    """The documents of a text file: a line of the separator ends one."""
    held: list[str] = []
    for line in chain(_lines(path), [SEPARATOR]):
        if line.strip() != SEPARATOR:
            held.append(line)
            continue
        document = "".join(held).strip("\n")
        if document.strip():
            yield document
        held = []


def _read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(
                f"{path}, line {number}: not JSON ({error})", hint="expected one JSON object a line"
            ) from None
        if not isinstance(row, dict):
            raise InputError(
                f"{path}, line {number}: expected a JSON object, found {type(row).__name__}",
                hint='a line looks like {"text": "..."}',
            )
        yield row


def _lines(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        position = 0
        for raw in file:
            try:
                yield raw.decode("utf-8-sig" if not position else "utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}: not UTF-8 (byte {position + error.start})", hint="save the file as UTF-8"
                ) from None
            position += len(raw)


def _read_hub(path: str, split: str, name: str | None) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(path, name, split=split)
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"{path}: neither a file here nor a dataset that can be loaded from the hub ({reason})",
            hint="check the path; for a hub dataset, its name, subset, split, the network and your access to it",
        ) from None
    yield from rows
