"""Lines of JSON that are only ever appended: each sealed with a checksum, and the file claimed by one process."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layerpeel.errors import RunError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

PATIENCE = 0.5  # seconds: somebody may just be looking whether the file is claimed


def seal(event: dict[str, Any], before: str) -> str:
    """The checksum of an event: of its JSON, and of what `before` says came before it."""
    own = json.dumps({key: value for key, value in event.items() if key != "seal"}, ensure_ascii=False)
    return hashlib.sha256((before + own).encode()).hexdigest()[:16]


def to_line(event: dict[str, Any]) -> bytes:
    return json.dumps(event, ensure_ascii=False).encode() + b"\n"


def from_line(line: bytes, before: str) -> dict[str, Any] | None:
    """The event in a line; None if a byte of it is not as it was written."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    good = isinstance(event, dict) and event.get("seal") == seal(event, before) and to_line(event) == line
    return event if good else None


def append(path: Path, line: bytes) -> None:
    """Returns once the line is on the disk."""
    with path.open("ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_events(path: Path) -> list[dict[str, Any]]:
    """The whole lines, each of which continues the chain; the last may be torn by a crash, or be on its way.

    Raises:
        RunError: it names the first line that is not as it was written.
    """
    events: list[dict[str, Any]] = []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        event = from_line(line + b"\n", events[-1]["seal"] if events else "")
        if event is None:
            raise RunError(
                f"{path}: damaged at line {number}",
                hint=f"the lines before it hold: keep only those (the first {number - 1}), and the same command does "
                "again what came later; or start in a new output folder",
            )
        events.append(event)
    return events


def cut_torn_line(path: Path) -> None:
    content = path.read_bytes()
    os.truncate(path, content.rfind(b"\n") + 1)


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Claims a file for the time of the context; gives False if another process has it. A claim ends with its process.

    Where files cannot be locked (some file systems, Windows), every claim is granted.
    """
    file = os.open(path, os.O_RDWR)
    try:
        granted, started = _lock(file, exclusive=True), time.monotonic()
        while not granted and time.monotonic() - started < PATIENCE:
            time.sleep(0.05)
            granted = _lock(file, exclusive=True)
        yield granted
    finally:
        os.close(file)


def is_claimed(path: Path) -> bool:
    """Whether a process of this machine has claimed the file (never, where files cannot be locked)."""
    with path.open("rb") as file:
        return not _lock(file.fileno(), exclusive=False)


def _lock(file: int, *, exclusive: bool) -> bool:
    """Takes a lock that ends with the descriptor or the process; False if another one is in the way."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some file systems know no locks
        return True
    return True
