"""The stderr console of the main process, progress bars, and escaping of untrusted text for terminals."""

from __future__ import annotations

import codecs
import io
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from layerpeel.processes.distributed import is_main_process

console = Console(stderr=True, highlight=False, quiet=not is_main_process())


# Bidirectional overrides, embeddings, isolates and marks, which can disguise what a line says.
BIDI_CONTROLS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C}


def plain(value: Any) -> str:
    """The text of `value` with control characters, bidirectional controls and lone surrogates as Python escapes."""
    return "".join(map(_escaped, str(value)))


def _escaped(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t"
    return f"\\u{ord(character):04x}" if hidden or ord(character) in BIDI_CONTROLS else character


def shown(value: Any) -> str:
    """As `plain`, with rich's markup escaped too: for untrusted text that a rich console prints."""
    return escape(plain(value))


# What stands for signs that a terminal or a pipe has no code for; others are written as escapes.
SUBSTITUTES = dict(zip("█━╸╺─│–−×•·≥≤’‘“”", "#----|--x*.><''\"\"", strict=True)) | {"→": "->", "…": "...", "±": "+-"}


def write_any_text(*streams: Any) -> None:
    """Lets text streams write signs that their encoding lacks as others, where they would raise an error."""
    codecs.register_error("layerpeel", _substitute)
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper) and not (stream.encoding or "").lower().startswith("utf"):
            stream.reconfigure(errors="layerpeel")


def _substitute(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    return "".join(SUBSTITUTES.get(sign) or _in_ascii(sign) for sign in signs), error.end


def _in_ascii(sign: str) -> str:
    """The letter without its accents, a box or block sign as ?, or an escape."""
    if unicodedata.name(sign, "").startswith("BOX DRAWINGS"):
        return "+"
    plain_sign = unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode()
    return plain_sign or sign.encode("ascii", "backslashreplace").decode()


class Advance(Protocol):
    """Advances a progress bar by `count` steps, and shows `note` beside it."""

    def __call__(self, count: int = 1, note: str = "") -> None: ...


@contextmanager
def progress(description: str, total: int) -> Iterator[Advance]:
    """Shows a progress bar of `total` steps while the context lasts, and yields what advances it.

    Without a terminal it shows no bar; work of over a second leaves a line with its duration either way.
    """
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
