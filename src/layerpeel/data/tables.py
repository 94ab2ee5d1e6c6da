"""The rows of CSV, TSV, JSON, parquet and arrow files.

A column is read by one rule, whatever is in it: the cells of CSV and TSV are text; JSON, parquet and arrow have types.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from layerpeel.data.cells import PlacedRow, TableRow, shortest
from layerpeel.data.text_files import parse_json, read_json_lines, read_lines
from layerpeel.errors import InputError

LARGEST_CELL = 2**31 - 1  # characters
SHORT_FLOATS = {"float": "float32", "halffloat": "float16"}  # arrow's names of them, and numpy's


def read_csv(path: Path, delimiter: str) -> Iterator[TableRow]:
    """The rows below the header; all cells are text, and empty ones the empty text.

    Raises:
        InputError: quotes are left open, a name is given to two columns, or a row has more or fewer cells than names.
    """
    csv.field_size_limit(LARGEST_CELL)
    names: list[str] = []
    for position, cells in _records(path, delimiter):
        if not names:
            names = cells
            _check_names([name for name in names if name], f"{path}, {position}")
        elif len(cells) != len(names):
            raise InputError(
                f"{path}, {position}: {len(cells)} cells, expected {len(names)} as in the first line",
                hint=f"quote a cell that holds a {'tab' if delimiter == chr(9) else 'comma'} or a line break",
            )
        else:  # a spreadsheet may end in columns without a name
            yield PlacedRow({name: cell for name, cell in zip(names, cells, strict=True) if name}, str(path), position)


def read_json(path: Path) -> Iterator[TableRow]:
    """The rows of a list of objects, or of objects on a line each.

    Raises:
        InputError: the file holds anything else.
    """
    if _holds_json_lines(path):
        yield from read_json_lines(path)
        return
    expected = "expected a list of objects, or one object a line"
    rows = parse_json("".join(read_lines(path)), str(path), expected)
    if not isinstance(rows, list):
        lists = [key for key, value in rows.items() if isinstance(value, list)] if isinstance(rows, dict) else []
        kind = f"one object of {', '.join(rows) or 'nothing'}" if isinstance(rows, dict) else type(rows).__name__
        raise InputError(
            f"{path}: {kind}, {expected}",
            hint=f"if the rows are the list '{lists[0]}', save that by itself"
            if lists
            else 'as in [{"text": "..."}, {"text": "..."}]; a single row may be in a .jsonl file',
        )
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise InputError(
                f"{path}, row {number}: expected a JSON object, found {type(row).__name__}",
                hint='as in [{"text": "..."}, {"text": "..."}]',
            )
        yield PlacedRow(row, str(path), f"row {number}")


def read_parquet(path: Path) -> Iterator[TableRow]:
    """Reads by pyarrow itself: the streams of `datasets` read ahead in threads that may hang a process as it exits."""
    from pyarrow import parquet

    with _opened(path) as source, parquet.ParquetFile(source) as file:
        yield from _typed_rows(file.iter_batches(batch_size=1024), file.schema_arrow.names, path)


def read_arrow(path: Path) -> Iterator[TableRow]:
    """Reads both forms of arrow files: streams, as `datasets` writes them, and those with an index at the end."""
    import pyarrow as pa

    with _opened(path) as source:
        try:
            reader = pa.ipc.open_stream(source)
            batches: Iterator[Any] = iter(reader)
        except pa.ArrowInvalid:
            source.seek(0)
            reader = pa.ipc.open_file(source)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        yield from _typed_rows(batches, reader.schema.names, path)


def _records(path: Path, delimiter: str) -> Iterator[tuple[str, list[str]]]:
    """The cells of each row that is not an empty line, and the line where it begins."""
    reader = csv.reader(read_lines(path), delimiter=delimiter, strict=True)
    while True:
        position = f"line {reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"{path}, {position}: not {'CSV' if delimiter == ',' else 'TSV'} ({error})",
                hint='write a cell with quotes in it in quotes, and each of its own twice: "she said ""no"""',
            ) from None
        if cells is None:
            return
        if cells:
            yield position, cells


def _holds_json_lines(path: Path) -> bool:
    first, second = (*islice((line for line in read_lines(path) if line.strip()), 2), "", "")[:2]
    if not second:
        return False
    try:
        return isinstance(parse_json(first, "", ""), dict)
    except InputError:
        return False


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file as pyarrow takes it, mapped into memory; unpacked there if it is a .gz."""
    import pyarrow as pa

    if path.suffix.lower() != ".gz":
        with pa.memory_map(str(path)) as source:
            yield source
        return
    with gzip.open(path) as file:
        yield pa.BufferReader(file.read())


def _typed_rows(batches: Iterator[Any], names: list[str], path: Path) -> Iterator[TableRow]:
    _check_names(names, str(path))
    number = 0
    for batch in batches:
        kinds = {
            column.name: SHORT_FLOATS[kind] for column in batch.schema if (kind := str(column.type)) in SHORT_FLOATS
        }
        for row in batch.to_pylist():
            number += 1
            short = {name: shortest(row[name], kind) for name, kind in kinds.items()}
            yield PlacedRow(row | short, str(path), f"row {number}")


def _check_names(names: list[str], where: str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"{where}: two columns are called '{twice}'", hint="give each column a name of its own")
