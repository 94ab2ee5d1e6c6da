"""What people see on stderr: progress with time left; text from models, data and configs as nothing but text."""

from __future__ import annotations

import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from layerpeel.processes.distributed import RANK

console = Console(stderr=True, highlight=False, quiet=RANK > 0)


# Bidirectional overrides, embeddings, isolates and marks: they can make a line read as something that it is not.
BIDI = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}


def plain(value: Any) -> str:
    """A text with its control characters, bidirectional overrides and lone surrogates written out by their numbers."""
    return "".join(map(_shown, str(value)))


def _shown(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
    return f"\\u{ord(character):04x}" if hidden or ord(character) in BIDI else character


def shown(value: Any) -> str:
    """As `plain`, and with rich's markup escaped: for whatever comes from outside and goes to a terminal."""
    return escape(plain(value))


class Advance(Protocol):
    """Moves a progress bar on by `count`, and says `note` beside it."""

    def __call__(self, count: int = 1, note: str = "") -> None: ...


@contextmanager
def progress(description: str, total: int) -> Iterator[Advance]:
    """Shows a bar for `total` steps; what it yields moves it on."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    started = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(plain(description), total=total, note="")
        yield lambda count=1, note="": bars.update(task, advance=count, note=plain(note))
    seconds = time.monotonic() - started
    if seconds > 1:
        console.print(f"{shown(description)}: {seconds:.0f} s", style="dim")
