"""Stopping in order: the first SIGINT or SIGTERM asks for it, a second one ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAME = 0.5  # seconds: a launcher passes on what the terminal has sent to all processes already
SAID = b"\nfinishing what is in hand; once more to end at once\n"


_asked: list[tuple[int, float]] = []  # the signal that asked for a stop, and when it came


class Interrupted(KeyboardInterrupt):
    """A stop that was asked for, raised where nothing is half done.

    Attributes:
        signal: the number of the signal that asked.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@contextmanager
def interruptible() -> Iterator[None]:
    """For the time of the context, signals ask for a stop, which `stop_if_asked` makes."""
    if threading.current_thread() is not threading.main_thread():  # only there can handlers be set
        yield
        return
    before = {number: signal.signal(number, _ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        _asked.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_asked() -> bool:
    return bool(_asked)


def stop_if_asked() -> None:
    """Raises `Interrupted` if a stop was asked for."""
    if _asked:
        raise Interrupted(_asked[0][0])


def _ask(number: int, frame: FrameType | None) -> None:
    if not _asked:
        _asked.append((number, time.monotonic()))
        os.write(2, SAID)
    elif time.monotonic() - _asked[0][1] > SAME:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
