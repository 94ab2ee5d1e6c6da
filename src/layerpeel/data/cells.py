"""Rows of tables, and their cells as text: as they were written, whatever the format made of them."""

from __future__ import annotations

import math
from datetime import date, time
from decimal import Decimal
from typing import Any

import numpy as np

from layerpeel.errors import InputError

TableRow = dict[str, Any]  # by column


class PlacedRow(TableRow):
    """A row that was read from a file; it equals the dict of its columns.

    Attributes:
        file: the file's path.
        position: where in it, as in `line 3` or `row 3`, from 1.
    """

    def __init__(self, columns: TableRow, file: str, position: str) -> None:
        super().__init__(columns)
        self.file, self.position = file, position


class WrittenFloat(float):
    """A number that keeps the form in which it was written: 1.50 is the text 1.50."""

    __slots__ = ("written",)

    written: str

    def __new__(cls, written: str) -> WrittenFloat:
        number = super().__new__(cls, written)
        number.written = written
        return number

    def __str__(self) -> str:
        return self.written


def shortest(number: float | None, kind: str) -> WrittenFloat | None:
    """A number of 32 or 16 bits in its shortest form: 0.1 is not 0.10000000149011612.

    Args:
        kind: its type in numpy, as float32.
    """
    return None if number is None else WrittenFloat(str(np.dtype(kind).type(number)))


def located(row: TableRow, where: str) -> str:
    """How messages about a row begin: `where`, then the row's file, if `where` does not end with it, and its line."""
    if not isinstance(row, PlacedRow):
        return where
    return ", ".join([where, *([] if where.endswith(row.file) else [row.file]), row.position])


def text_form(value: Any) -> str | None:
    """A cell as text: numbers as written, `true` and `false`, dates as 2024-01-31 (and 2024-01-31 12:00:00).

    Numbers of typed tables (parquet, arrow) have the shortest form that gives the same number.

    Returns:
        None if the cell is empty or no text: null, NaN, bytes, a list, a mapping.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float | Decimal) and math.isnan(value):
        return None
    return str(value) if isinstance(value, str | int | float | Decimal | date | time) else None


def column_of(row: TableRow, column: str, where: str) -> Any:
    """A row's value in a column.

    Args:
        where: what the message of an error begins with; the row's line is added.

    Raises:
        InputError: the column is absent; those present are named.
    """
    if column not in row:
        raise InputError(
            f"{located(row, where)}: no column '{column}'",
            hint=f"columns there: {', '.join(map(str, row)) or 'none'}",
        )
    return row[column]


def text_of(row: TableRow, column: str, where: str) -> str:
    """A row's text in a column.

    Raises:
        InputError: the column is absent, or holds something other than text.
    """
    text = column_of(row, column, where)
    if not isinstance(text, str):
        raise InputError(
            f"{located(row, where)}: column '{column}' holds {type(text).__name__}, expected text",
            hint=f"columns there: {', '.join(map(str, row))}",
        )
    return text
