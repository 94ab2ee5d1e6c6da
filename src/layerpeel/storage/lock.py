"""A file that one process claims for itself."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from layerpeel.processes.distributed import is_main_process

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


PATIENCE = 0.5  # seconds: another process may hold it for a moment, to see whether it is claimed


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Claims a file for the time of the context; gives False if another process has it. A claim ends with its process.

    Of the processes that a launcher started the main one claims it for all. Where files cannot be locked (some file
    systems, Windows), every claim is granted.
    """
    if not is_main_process():
        yield True
        return
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
