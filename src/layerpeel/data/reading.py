"""Rows of text files, tables and datasets, read lazily."""

from __future__ import annotations

import atexit
import glob
import os
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

from layerpeel.data.cells import PlacedRow, TableRow, shortest
from layerpeel.data.tables import read_arrow, read_csv, read_json, read_parquet
from layerpeel.data.text_files import read_documents_of, read_json_lines
from layerpeel.errors import InputError, reason_of
from layerpeel.storage.hub import is_hub_name, use_cache_without_hub
from layerpeel.storage.outputs import windows_hint

READERS: dict[str, Callable[[Path], Iterator[TableRow]]] = {
    ".txt": read_documents_of,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".jsonlines": read_json_lines,
    ".json": read_json,
    ".csv": lambda path: read_csv(path, ","),
    ".tsv": lambda path: read_csv(path, "\t"),
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
TYPED = (".parquet", ".arrow")
ARCHIVES = (".zst", ".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz")


def read_rows(path: str, *, split: str = "train", name: str | None = None, stream: bool = False) -> Iterator[TableRow]:
    """The rows of a file, folder, glob, saved dataset or hub dataset, as dicts.

    A .txt file gives rows with one column, `text`: its documents. All files may be packed as .gz. Endings count in
    capitals too; files with other endings are refused.

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
    elif is_hub_text(path):
        yield from _read_hub(path, split, name, stream)
    else:
        where = "check the path; it is taken from the config's folder first; a hub dataset is named owner/name"
        hint = windows_hint(path) or where
        raise InputError(f"no such file: {path}", hint=hint)


def is_hub_text(path: str) -> bool:
    """Whether a path is read as the name of a hub dataset: it may be one, and is not here, nor called like a file."""
    return is_hub_name(path) and not os.path.exists(path) and _kind(Path(path)) not in READERS


def files_of(path: str) -> list[Path]:
    """The files that the rows of a path come from, in their order; a path that leads nowhere, as it is.

    Of a folder they are those right in it that can be read; of a saved dataset, those of all its splits.

    Raises:
        InputError: it is a glob, and no file matches.
    """
    places = expand(path)
    return [file for place in places for file in (_files_in(Path(place)) if os.path.isdir(place) else [Path(place)])]


def _files_in(folder: Path) -> list[Path]:
    files = folder.rglob("*.arrow") if is_saved_dataset(folder) else folder.iterdir()
    return sorted(f for f in files if _kind(f) in READERS and not f.name.startswith(".") and f.is_file())


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote a folder."""
    return (folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()


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


def _read_folder(folder: Path, split: str) -> Iterator[TableRow]:
    if is_saved_dataset(folder):
        yield from _read_dataset(
            lambda: _numbered(_load_saved(folder, split), str(folder)),
            f"{folder}: this saved dataset cannot be read",
            "save it again with save_to_disk",
        )
        return
    files = files_of(str(folder))
    if not files:
        raise InputError(
            f"{folder}: nothing to read in this folder",
            hint=f"expected {_endings()} files right in it (or .gz of them), or a dataset saved with save_to_disk; "
            "name files further down by a glob, as in data/train-*.parquet",
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
    if kind not in READERS:
        raise InputError(
            f"{path}: files that end in {kind} are not read"
            if kind
            else f"{path}: a file without an ending is not read",
            hint=f"expected {_endings()}, or .gz of them; plain text of any kind may be called .txt",
        )
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty", hint="give a file with text in it")
    if kind in TYPED:
        yield from _read_dataset(
            lambda: READERS[kind](path), f"{path}: cannot be read", f"expected {kind[1:]}, as the file's name says"
        )
    else:
        yield from READERS[kind](path)


def _kind(path: Path) -> str:
    """The format of a file, by the last suffix of its name but .gz, in lower case."""
    return (Path(path.stem) if path.suffix.lower() == ".gz" else path).suffix.lower()


def _endings() -> str:
    return f"{', '.join([*READERS][:-1])} or {[*READERS][-1]}"


def _numbered(rows: Iterable[TableRow], path: str) -> Iterator[TableRow]:
    features = getattr(rows, "features", None) or {}  # a stream may not know them
    kinds = {
        name: kind.dtype for name, kind in features.items() if getattr(kind, "dtype", "") in ("float32", "float16")
    }
    for number, row in enumerate(rows, start=1):
        short = {name: shortest(row[name], kind) for name, kind in kinds.items()}
        yield PlacedRow(row | short, path, f"row {number}")


def _read_dataset(load: Callable[[], Iterable[TableRow]], wrong: str, hint: str) -> Iterator[TableRow]:
    """The rows that `load` gives; any error of a library becomes an InputError, `wrong (reason)`."""
    try:
        yield from load()
    except InputError:
        raise
    except Exception as error:
        cause = error.__cause__ or error  # datasets hides the reason behind "an error occurred"
        raise InputError(f"{wrong} ({reason_of(cause)})", hint=hint) from None


def _read_hub(path: str, split: str, name: str | None, stream: bool) -> Iterator[TableRow]:
    yield from _read_dataset(
        lambda: _numbered(_load_hub(path, split, name, stream), path),
        f"{path}: neither a file here nor a dataset that can be loaded from the hub",
        "check the path; for a hub dataset, its name, subset, split, the network and your access to it",
    )


def _load_hub(path: str, split: str, name: str | None, stream: bool) -> Iterable[TableRow]:
    import datasets

    use_cache_without_hub()
    stream = stream and not datasets.config.HF_HUB_OFFLINE  # an earlier download can only be read as a whole
    if stream:
        _wait_for_readers_at_exit()
    return datasets.load_dataset(path, name, split=split, streaming=stream)


@cache
def _wait_for_readers_at_exit() -> None:
    """A stream that is left early reads on in threads of pyarrow, which may crash or hang a process at exit."""
    atexit.register(time.sleep, 1)
