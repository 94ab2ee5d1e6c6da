"""Cells as they were written, whatever the file's kind, line ends and neighbours in the column."""

from __future__ import annotations

import csv
import gzip
import json
import re
import tempfile
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from layerpeel.config.fields import TextConfig
from layerpeel.data.cells import text_form
from layerpeel.data.documents import read_documents
from layerpeel.data.reading import read_rows
from layerpeel.errors import InputError

TEXTS = ["007", "1.50", "true", "NA", "", "2024-01-31", "1e3", "null", "-0", "  a ", "4", "1,000", 'say "no"', "a\nb"]


@pytest.mark.parametrize(("ending", "delimiter"), [("csv", ","), ("tsv", "\t"), ("CSV", ","), ("TSV", "\t")])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_cells_of_csv_and_tsv_are_what_the_file_says(
    tmp_path: Path, ending: str, delimiter: str, line_end: str, mark: bytes
) -> None:
    lines = [f"target{delimiter}n"] + [
        '"' + text.replace('"', '""') + f'"{delimiter}{i}' if set(text) & set('",\n\t') else f"{text}{delimiter}{i}"
        for i, text in enumerate(TEXTS)
    ]
    path = tmp_path / f"a.{ending}"
    path.write_bytes(mark + "\n".join([*lines, ""]).replace("\n", line_end).encode())
    assert list(read_rows(str(path))) == [{"target": text, "n": str(i)} for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("ending", ["txt", "jsonl", "json", "csv", "tsv", "txt.gz", "NDJSON", "jsonlines", "TXT.GZ"])
def test_line_ends_and_marks_change_no_document(tmp_path: Path, ending: str) -> None:
    kind = ending.lower().removesuffix(".gz")
    rows = ["one", "two\n\nthree", "four"] if kind in ("txt", "csv", "tsv") else ["one", "two", "four"]
    content = {
        "txt": "\n<|endoftext|>\n".join(rows),
        "json": json.dumps([{"text": text} for text in rows], indent=1),
        "csv": "text\n" + "\n".join(f'"{text}"' for text in rows),
    }
    content["tsv"] = content["csv"]
    written = content.get(kind, "".join(f"{json.dumps({'text': text})}\n\n" for text in rows))
    for mark in ("", "\ufeff"):
        for line_end in ("\n", "\r\n", "\r"):
            data = (mark + written).replace("\n", line_end).encode()
            path = tmp_path / f"a.{ending}"
            path.write_bytes(gzip.compress(data) if ending.lower().endswith("gz") else data)
            assert list(read_documents(TextConfig(path=str(path)))) == rows


@pytest.mark.parametrize("ending", ["jsonl", "json", "lines.json"])
def test_numbers_of_json_are_text_as_written_and_numbers_as_before(tmp_path: Path, ending: str) -> None:
    cells = ["1.50", "7", "1e3", "true", "false", '"007"', "0.1234567890123456789", "-0", "null"]
    rows = [f'{{"target": {cell}}}' for cell in cells]
    path = tmp_path / f"a.{ending}"
    path.write_text(f"[{','.join(rows)}]" if ending == "json" else "\n".join(rows))
    values = [row["target"] for row in read_rows(str(path))]
    assert [text_form(value) for value in values] == [*cells[:5], "007", *cells[6:8], None]
    assert values == [1.5, 7, 1000.0, True, False, "007", 0.1234567890123456789, 0, None]
    assert type(values[1]) is int and json.loads(json.dumps(values)) == values


@given(
    st.lists(st.tuples(*[st.text(max_size=9)] * 2), min_size=1, max_size=4), st.sampled_from([",", "\t"]), st.booleans()
)
def test_any_cell_comes_back(cells: list[tuple[str, str]], delimiter: str, quote_all: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("a.csv" if delimiter == "," else "a.tsv")
        with path.open("w", encoding="utf-8", newline="") as file:
            quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
            csv.writer(file, delimiter=delimiter, quoting=quoting).writerows([("a", "b"), *cells])
        lines = [{"a": first, "b": second} for first, second in cells]
        expected = [{name: re.sub("\r\n?", "\n", text) for name, text in row.items()} for row in lines]
        assert list(read_rows(str(path))) == expected


def typed_table() -> pa.Table:
    return pa.table(
        {
            "int": pa.array([4, None]),
            "float": pa.array([1.5, None]),
            "float32": pa.array([0.1, None], pa.float32()),
            "float16": pa.array([np.float16(0.1), None], pa.float16()),
            "bool": [True, None],
            "decimal": [Decimal("1.50"), None],
            "date": [date(2024, 1, 31), None],
            "time": [datetime(2024, 1, 31, 12, 30), None],
            "category": pa.array(["007", None]).dictionary_encode(),
        }
    )


def save_arrow(table: pa.Table, path: Path, open_file: Callable[..., Any]) -> None:
    with pa.OSFile(str(path), "wb") as sink, open_file(sink, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("ending", ["parquet", "PARQUET", "parquet.gz", "arrow", "stream.arrow"])
def test_typed_cells_are_text_in_their_shortest_form(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    if "arrow" in ending:
        save_arrow(typed_table(), path, pa.ipc.new_stream if ending.startswith("stream") else pa.ipc.new_file)
    else:
        parquet.write_table(typed_table(), path)
    if ending.endswith("gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    full, empty = read_rows(str(path))
    assert {name: text_form(cell) for name, cell in full.items()} == {
        "int": "4",
        "float": "1.5",
        "float32": "0.1",
        "float16": "0.1",
        "bool": "true",
        "decimal": "1.50",
        "date": "2024-01-31",
        "time": "2024-01-31 12:30:00",
        "category": "007",
    }
    assert set(map(text_form, empty.values())) == {None}


def test_cells_of_a_saved_dataset_are_text_in_their_shortest_form(tmp_path: Path) -> None:
    kinds = datasets.Features({"n": datasets.Value("float32"), "day": datasets.Value("date32")})
    rows = [{"n": 0.1, "day": date(2024, 1, 31)}, {"n": None, "day": None}]
    datasets.Dataset.from_list(rows, features=kinds).save_to_disk(tmp_path / "saved")
    read = [[text_form(cell) for cell in row.values()] for row in read_rows(str(tmp_path / "saved"))]
    assert read == [["0.1", "2024-01-31"], [None, None]]


@pytest.mark.parametrize("cell", [None, float("nan"), Decimal("NaN"), b"a", ["a"], {"a": 1}])
def test_what_is_no_text(cell: Any) -> None:
    assert text_form(cell) is None


def test_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), path)
    with pytest.raises(InputError, match=r"a\.parquet: two columns are called 'text'"):
        list(read_rows(str(path)))


def test_columns_without_a_name_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",text,,\n0,a,,\n1,b,,\n")
    assert list(read_rows(str(tmp_path / "a.csv"))) == [{"text": "a"}, {"text": "b"}]


def test_long_cells_are_read(tmp_path: Path) -> None:
    long = "word " * 100_000  # the csv module alone stops at 131,072 characters
    (tmp_path / "a.csv").write_text(f"text\n{long}\n")
    assert list(read_rows(str(tmp_path / "a.csv"))) == [{"text": long}]


def test_hidden_files_of_a_folder_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "._a.txt").write_bytes(b"\xff\x00")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "README.md").write_text("# not text to train on")
    assert list(read_rows(str(tmp_path))) == [{"text": "a"}]
