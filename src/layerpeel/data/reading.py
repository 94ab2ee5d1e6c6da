"""Rows of text files, tables and datasets, read lazily."""

from __future__ import annotations

import atexit
import glob
import gzip
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from layerpeel.errors import InputError
from layerpeel.storage.outputs import windows_hint

TableRow = dict[str, Any]  # by column


SEPARATOR = "<|endoftext|>"  # between the documents of a .txt file
TABLES = {".json": "json", ".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
READABLE = (".txt", ".jsonl", *TABLES)
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half of a character; JSON may hold one without the other
ARCHIVES = (".zst", ".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz")


def read_rows(path: str, *, split: str = "train", name: str | None = None, stream: bool = False) -> Iterator[TableRow]:
    """The rows of a file, folder, glob, saved dataset or hub dataset, as dicts.

    A .txt file gives rows with one column, `text`: its documents. Text files and tables may be packed as .gz.

    Args:
        stream: read a hub dataset over the network row by row, instead of first fetching all of it.

    Raises:
        InputError: it is missing, empty, or not of the format that its name says; the message names file and line.
    """
    files = expand(path)
    if len(files) > 1:
        for file in files:
            yield from read_rows(file, split=split)
        return
    (path,) = files
    if os.path.isdir(path):  # os.path, as pathlib raises for texts that no file can have as a name
        yield from _read_folder(Path(path), split)
    elif os.path.isfile(path):
        yield from _read_file(Path(path))
    elif windows_hint(path) or _kind(Path(path)) in READABLE or path.startswith((".", "/", "~")):
        hint = windows_hint(path) or "check the path; it is taken from the config's folder first"
        raise InputError(f"no such file: {path}", hint=hint)
    else:
        yield from _read_hub(path, split, name, stream)


def expand(path: str) -> list[str]:
    """The files that a glob matches, sorted; a path that is no glob, as it is.

    Raises:
        InputError: no file matches.
    """
    if os.path.exists(path) or not glob.has_magic(path):
        return [path]
    files = sorted(glob.glob(path))
    if not files:
        raise InputError(f"no file matches {path}", hint="check the path; it is taken from the config's folder first")
    return files


def column_of(row: TableRow, column: str, where: str) -> Any:
    """A row's value in a column.

    Args:
        where: what the message of an error begins with.

    Raises:
        InputError: the column is absent; those present are named.
    """
    if column not in row:
        raise InputError(f"{where}: no column '{column}'", hint=f"columns there: {', '.join(map(str, row)) or 'none'}")
    return row[column]


def text_of(row: TableRow, column: str, where: str) -> str:
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


def _read_folder(folder: Path, split: str) -> Iterator[TableRow]:
    if (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file():
        yield from _read_dataset(
            lambda: _load_saved(folder, split),
            f"{folder}: this saved dataset cannot be read",
            "save it again with save_to_disk",
        )
        return
    files = sorted(path for path in folder.iterdir() if _kind(path) in READABLE)
    if not files:
        raise InputError(
            f"{folder}: nothing to read in this folder",
            hint="expected .txt, .jsonl, .json, .csv, .parquet or .arrow files right in it (or .gz of them), or a "
            "dataset saved with save_to_disk; name files further down by a glob, as in data/train-*.parquet",
        )
    for file in files:
        yield from _read_file(file)


def _load_saved(folder: Path, split: str) -> Iterable[TableRow]:
    import datasets

    saved = datasets.load_from_disk(str(folder))
    if not isinstance(saved, datasets.DatasetDict):
        return saved
    if split not in saved:
        raise InputError(f"{folder}: no split '{split}'", hint=f"splits there: {', '.join(saved)}")
    return saved[split]


def _read_file(path: Path) -> Iterator[TableRow]:
    kind = _kind(path)
    if kind in ARCHIVES:
        raise InputError(f"{path}: {kind} files are not read", hint="unpack it; of packed files, .gz ones are read")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty", hint="give a file with text in it")
    if kind in TABLES:
        yield from _read_dataset(
            lambda: _load_table(path), f"{path}: cannot be read", f"expected {kind[1:]}, as the file's name says"
        )
    elif kind == ".jsonl":
        yield from _read_jsonl(path)
    else:
        yield from ({"text": document} for document in _read_text(path))


def _kind(path: Path) -> str:
    """The format of a file, by the last suffix of its name but .gz."""
    return (Path(path.stem) if path.suffix == ".gz" else path).suffix


def _load_table(path: Path) -> Iterable[TableRow]:
    if path.suffix == ".parquet":
        return _read_parquet(path)
    import datasets

    return datasets.load_dataset(TABLES[_kind(path)], data_files=glob.escape(str(path)), split="train", streaming=True)


def _read_parquet(path: Path) -> Iterator[TableRow]:
    """Reads by pyarrow itself: the streams of `datasets` read ahead in threads that may hang a process as it exits."""
    from pyarrow import parquet

    with parquet.ParquetFile(path, memory_map=True) as file:
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()


def _read_dataset(load: Callable[[], Iterable[TableRow]], wrong: str, hint: str) -> Iterator[TableRow]:
    """The rows that `load` gives; any error of a library becomes an InputError, `wrong (reason)`."""
    try:
        yield from load()
    except InputError:
        raise
    except Exception as error:
        cause = error.__cause__ or error  # datasets hides the reason behind "an error occurred"
        reason = next(iter(str(cause).strip().splitlines()), type(cause).__name__)
        raise InputError(f"{wrong} ({reason})", hint=hint) from None


def _read_text(path: Path) -> Iterator[str]:
    """The documents of a text file; a line with only the separator ends one."""
    lines: list[str] = []
    for line in chain(_lines(path), [SEPARATOR]):
        if line.strip() != SEPARATOR:
            lines.append(line)
            continue
        document = "".join(lines).strip("\n")
        if document.strip():
            yield document
        lines = []


def _read_jsonl(path: Path) -> Iterator[TableRow]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if SURROGATE.search(line):
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{path}, line {number}: half a character, which no text can hold ({error.reason})",
                hint="write it without \\ud800 and the like, or with both halves",
            ) from None
        except (ValueError, RecursionError) as error:
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
    position = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for raw in file:
                yield raw.decode("utf-8-sig" if not position else "utf-8")
                position += len(raw)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {position + error.start})", hint="save the file as UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error})", hint="is it whole, and may you read it?") from None


def _read_hub(path: str, split: str, name: str | None, stream: bool) -> Iterator[TableRow]:
    yield from _read_dataset(
        lambda: _load_hub(path, split, name, stream),
        f"{path}: neither a file here nor a dataset that can be loaded from the hub",
        "check the path; for a hub dataset, its name, subset, split, the network and your access to it",
    )


def _load_hub(path: str, split: str, name: str | None, stream: bool) -> Iterable[TableRow]:
    import datasets

    try:
        if stream:
            _wait_for_readers_at_exit()
        return datasets.load_dataset(path, name, split=split, streaming=stream)
    except Exception:
        if not stream:
            raise
    return datasets.load_dataset(path, name, split=split)  # without a network: from an earlier download


@cache
def _wait_for_readers_at_exit() -> None:
    """A stream that is left early reads on in threads of pyarrow, which may crash or hang a process at exit."""
    atexit.register(time.sleep, 1)
