"""Text and numbers as people read them."""

from __future__ import annotations

import time
from typing import Any

from layerpeel.processes.progress import plain


def one_line(value: Any, width: int = 80) -> str:
    """As `plain`, in one line, cut to a width."""
    text = " ".join(plain(value).split())
    return text if len(text) <= width else text[: width - 1] + "…"


def number(value: float | None, digits: int = 3) -> str:
    """Three digits after the point for scores below ten, one for larger ones, as in the tables of `layerpeel run`."""
    if value is None:
        return "–"
    if value != value:
        return "not a number"
    places = digits if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    return f"{value:,.{places}f}".replace("-", "−")


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}".replace("-", "−")


def count(value: float | None) -> str:
    """2.47 B, 41.3 M, 950 k; three digits."""
    return _scaled(value, ["", " k", " M", " B", " T"])


def size(value: float | None) -> str:
    """Bytes as 12.4 MB (of 1000 * 1000 bytes)."""
    return _scaled(value, [" B", " kB", " MB", " GB", " TB"])


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def moment(seconds: float | None) -> str:
    """A time of the journal's, in UTC."""
    return "–" if seconds is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _scaled(value: float | None, units: list[str]) -> str:
    if value is None:
        return "–"
    place = 0
    while value >= 1000 and place < len(units) - 1:
        value, place = value / 1000, place + 1
    places = 0 if not place or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{places}f}{units[place]}"
