"""Formats numbers, sizes, durations and one-line texts for tables and messages."""

from __future__ import annotations

import time
from typing import Any

from layerpeel.processes.progress import plain


def one_line(value: Any, width: int = 80) -> str:
    """As `plain`, with whitespace collapsed to one line, cut to `width` characters."""
    text = " ".join(plain(value).split())
    return text if len(text) <= width else text[: width - 1] + "…"


def number(value: float | None, digits: int = 3) -> str:
    """A score: `digits` decimals below 10, one below 1000, none above; thousands are separated by commas."""
    if value is None:
        return "–"
    if value != value:
        return "not a number"
    decimals = digits if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    return f"{value:,.{decimals}f}".replace("-", "−")


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}".replace("-", "−")


def count(value: float | None) -> str:
    """A count with three significant digits: 2.47 B, 41.3 M, 950 k."""
    return _scaled(value, ["", " k", " M", " B", " T"])


def size(value: float | None) -> str:
    """A number of bytes with three significant digits and a decimal unit: 12.4 MB is 12,400,000 bytes."""
    return _scaled(value, [" B", " kB", " MB", " GB", " TB"])


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def moment(seconds: float | None) -> str:
    """A time in seconds since the epoch, as date and minute in UTC."""
    return "–" if seconds is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _scaled(value: float | None, units: list[str]) -> str:
    if value is None:
        return "–"
    unit = 0
    while value >= 1000 and unit < len(units) - 1:
        value, unit = value / 1000, unit + 1
    decimals = 0 if not unit or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{decimals}f}{units[unit]}"
