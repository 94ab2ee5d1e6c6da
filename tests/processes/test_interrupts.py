"""The first signal asks for a stop, a second one ends the process; of several, all stop where one is asked."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from layerpeel.importance.metrics import make_metric
from layerpeel.inference.refitting import LayerRefit
from layerpeel.processes import interrupts
from layerpeel.processes.distributed import RANK
from layerpeel.processes.interrupts import Interrupted, interruptible, stop_asked, stop_if_asked
from layerpeel.training.repair_states import RepairState
from layerpeel.training.state import TrainingState
from tests.importance.test_repaired_kl import inputs_of
from tests.launching import launch
from tests.training.test_repair import repaired
from tests.training.test_rounds import train, write_text


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


@pytest.mark.slow
def test_all_processes_stop_where_one_is_asked(tmp_path: Path) -> None:
    write_text(tmp_path / "text.jsonl")
    launch("-m", "tests.processes.test_interrupts", str(tmp_path))
    assert sorted(path.name for path in tmp_path.glob("stopped-*")) == ["stopped-0", "stopped-1"]


def _worker(folder: Path) -> None:
    """What each of the processes runs: works that the second one alone is asked to stop, in the middle."""
    text, refit, refits = folder / "text.jsonl", LayerRefit.refit, [0]

    def asked_at_the_second_step(point: dict[str, float]) -> None:
        if RANK and point["tokens"] > 200:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked_at_the_third_refit(*arguments: Any) -> Any:
        refits[0] += 1
        if RANK and refits[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return refit(*arguments)

    LayerRefit.refit = asked_at_the_third_refit  # type: ignore[method-assign]
    training = TrainingState(folder / "training", "this training", every=1e9)
    repair = RepairState(folder / "repair", "this repair")
    _stops(lambda: train(text, log=asked_at_the_second_step))
    _stops(lambda: train(text, log=asked_at_the_second_step, state=training))
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    _stops(lambda: train(text, log=asked_at_the_second_step))
    _stops(lambda: repaired(text, state=repair))
    refits[0] = 0
    _stops(lambda: make_metric("repaired_kl").score(inputs_of("llama")))
    torch.distributed.barrier()
    assert [*training.folder.rglob("*.safetensors")]
    assert len([*repair.folder.glob("*.safetensors")]) == 3
    (folder / f"stopped-{RANK}").touch()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _stops(work: Callable[[], Any]) -> None:
    with interruptible(), pytest.raises(Interrupted) as stop:
        work()
    assert stop.value.signal == signal.SIGTERM


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
