"""Graceful interruption: the first SIGINT or SIGTERM requests a stop at the next safe point, a second one kills."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from layerpeel.processes.distributed import sum_numbers

if TYPE_CHECKING:
    import torch

SIGNALS = (signal.SIGINT, signal.SIGTERM)
DUPLICATE_WINDOW = 0.5  # seconds: a launcher forwards the signal that the terminal sent to every process already
NOTICE = b"\nfinishing what is in hand; once more to end at once\n"

_requests: list[tuple[int, float]] = []  # signal number and monotonic time of the pending stop request, if any


class Interrupted(KeyboardInterrupt):
    """A requested stop, raised at a point from which the run can resume.

    Attributes:
        signal: the number of the signal that requested it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


@contextmanager
def interruptible() -> Iterator[None]:
    """While the context lasts, SIGINT and SIGTERM request a stop, which `stop_if_asked` carries out."""
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers in the main thread only
        yield
        return
    previous = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    try:
        yield
    finally:
        _requests.clear()
        for number, handler in previous.items():
            signal.signal(number, handler)


def stop_asked() -> bool:
    """Whether a stop was requested."""
    return bool(_requests)


def stop_if_asked() -> None:
    """Raises `Interrupted` if a stop was requested."""
    if _requests:
        raise Interrupted(_requests[0][0])


def stop_if_any_asked(device: torch.device) -> None:
    """Raises `Interrupted` in all processes once one was asked to stop; all have to call it, at the same place.

    So none of them waits in a collective for one that has gone.
    """
    asked = {number for number, _ in _requests}
    processes = sum_numbers({number.name: number in asked for number in SIGNALS}, device)
    for number in SIGNALS:
        if processes[number.name]:
            raise Interrupted(number)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if not _requests:
        _requests.append((number, time.monotonic()))
        os.write(2, NOTICE)
    elif time.monotonic() - _requests[0][1] > DUPLICATE_WINDOW:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
