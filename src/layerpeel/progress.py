"""Progress with time left, on stderr."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

RANK = int(os.environ.get("RANK", "0"))  # of this process among those that a launcher started
console = Console(stderr=True, highlight=False, quiet=RANK > 0)


class Advance(Protocol):
    """Moves a progress bar on by `count`, and says `note` beside it."""

    def __call__(self, count: int = 1, note: str = "") -> None: ...


@contextmanager
def progress(description: str, total: int) -> Iterator[Advance]:
    """Shows a bar for `total` steps; what it yields moves it on."""
    columns = (
        TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    started = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(description, total=total, note="")
        yield lambda count=1, note="": bars.update(task, advance=count, note=note)
    seconds = time.monotonic() - started
    if seconds > 1:
        console.print(f"{description}: {seconds:.0f} s", style="dim")
