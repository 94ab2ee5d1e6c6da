"""The first signal asks for a stop, a second one ends the process."""

from __future__ import annotations

import os
import signal

import pytest

from layerpeel.processes import interrupts
from layerpeel.processes.interrupts import Interrupted, interruptible, stop_asked, stop_if_asked


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with interruptible():
        stop_if_asked()
        os.kill(os.getpid(), number)
        assert stop_asked()
        with pytest.raises(Interrupted) as stop:
            stop_if_asked()
        assert stop.value.signal == number and isinstance(stop.value, KeyboardInterrupt)
    assert not stop_asked() and signal.getsignal(number) is before


def test_a_second_one_ends_the_process_unless_it_comes_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    kill, sent = os.kill, list[int]()
    with interruptible():
        kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr("layerpeel.processes.interrupts.os.kill", lambda pid, number: sent.append(number))
        kill(os.getpid(), signal.SIGTERM)  # a launcher's copy of it
        assert not sent
        monkeypatch.setattr(interrupts, "DUPLICATE_WINDOW", 0.0)
        kill(os.getpid(), signal.SIGTERM)
        assert sent == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
