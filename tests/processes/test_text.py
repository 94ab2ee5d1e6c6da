from __future__ import annotations

import pytest

from layerpeel.processes.progress import plain
from layerpeel.processes.text import count, duration, number, one_line, percent, size


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (999, "999"),
        (1000, "1.00 k"),
        (2_470_000_000, "2.47 B"),
        (41_300_000, "41.3 M"),
        (950_000, "950 k"),
        (None, "–"),
    ],
)
def test_counts(value: int | None, shown: str) -> None:
    assert count(value) == shown


def test_numbers_are_rounded_with_sense() -> None:
    assert [number(v) for v in (0.12345, -0.5, 12.345, 12345.6, float("nan"), None)] == [
        "0.123",
        "−0.500",
        "12.3",
        "12,346",
        "not a number",
        "–",
    ]
    assert (percent(0.98765), size(1_240_000), duration(0.25), duration(75), duration(7260)) == (
        "98.8",
        "1.24 MB",
        "0.2 s",
        "1 min 15 s",
        "2 h 1 min",
    )


def test_hidden_characters_are_written_out_and_others_stay() -> None:
    assert plain("a\u202eb\x1b[0m\x00\ud800") == "a\\u202eb\\u001b[0m\\u0000\\ud800"
    assert plain("строка\n\tعربى 中") == "строка\n\tعربى 中"
    assert one_line("a\n\n b" + "c" * 10, 6) == "a bcc…"
