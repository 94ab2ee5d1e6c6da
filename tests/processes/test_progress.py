"""Terminals and pipes without unicode get other signs, never an error."""

from __future__ import annotations

import io

import pytest

from layerpeel.processes.progress import write_any_text


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("cp1252", "# × 12 -> 8 … – é ±"),
        ("ascii", "# x 12 -> 8 ... - e +-"),
        ("utf-8", "█ × 12 → 8 … – é ±"),
    ],
)
def test_signs_that_an_encoding_lacks(encoding: str, expected: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    write_any_text(stream)
    stream.write("█ × 12 → 8 … – é ±")
    stream.flush()
    assert stream.buffer.getvalue().decode(encoding) == expected  # type: ignore[attr-defined]


def test_words_in_other_scripts_are_escaped() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    write_any_text(stream)
    stream.write("Жук ╭ \ud800")
    stream.flush()
    assert stream.buffer.getvalue() == rb"\u0416\u0443\u043a + \ud800"  # type: ignore[attr-defined]
