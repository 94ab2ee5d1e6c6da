"""Lines of JSON that are only ever appended, each with a checksum that covers the lines before it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from layerpeel.errors import RunError
from layerpeel.processes.distributed import is_main_process


def checksum(event: dict[str, Any], before: str) -> str:
    """The checksum of an event: of its JSON, and of what `before` says came before it."""
    text = json.dumps({key: value for key, value in event.items() if key != "checksum"}, ensure_ascii=False)
    return hashlib.sha256((before + text).encode()).hexdigest()[:16]


def to_line(event: dict[str, Any]) -> bytes:
    return json.dumps(event, ensure_ascii=False).encode() + b"\n"


def from_line(line: bytes, before: str) -> dict[str, Any] | None:
    """The event in a line; None if a byte of it is not as it was written."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    good = isinstance(event, dict) and event.get("checksum") == checksum(event, before) and to_line(event) == line
    return event if good else None


def append(path: Path, line: bytes, *, each_process: bool = False) -> None:
    """Returns once the line is on the disk.

    Args:
        each_process: each process writes, to a file of its own; not only the main one.
    """
    if not (each_process or is_main_process()):
        return
    with path.open("ab") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of all complete lines, each of which continues the chain; the last may be torn, or still be written.

    Raises:
        RunError: it names the first line that is not as it was written.
    """
    events: list[dict[str, Any]] = []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        event = from_line(line + b"\n", events[-1]["checksum"] if events else "")
        if event is None:
            raise RunError(
                f"{path}: damaged at line {number}",
                hint=f"the lines before it hold: keep only those (the first {number - 1}), and the same command does "
                "again what came later; or start in a new output folder",
            )
        events.append(event)
    return events


def cut_torn_line(path: Path) -> None:
    """Removes what a crash has left of a last line; the main process does."""
    if not is_main_process():
        return
    content = path.read_bytes()
    os.truncate(path, content.rfind(b"\n") + 1)
