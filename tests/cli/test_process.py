"""What is printed for an exception where there are several processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from layerpeel.cli.process import main
from layerpeel.errors import InputError
from layerpeel.processes.distributed import RANK
from tests.cli.test_cli import fill
from tests.launching import launch


@pytest.mark.slow
def test_an_error_in_another_process_than_the_main_one_is_told(tmp_path: Path) -> None:
    fill(tmp_path)
    told = launch("-m", "tests.cli.test_process", "score", str(tmp_path / "run.yaml"), dies=True)
    assert "error (process 1): this disk is on fire" in told


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError("this disk is on fire"), "error (process 3): this disk is on fire\n"),
        (PermissionError(13, "Permission denied", "a.jsonl"), "error (process 3): a.jsonl: Permission denied\n"),
        (InputError("seen by all"), ""),
    ],
)
def test_another_process_leaves_bad_input_to_the_main_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, expected: str
) -> None:
    monkeypatch.setattr("layerpeel.cli.process.RANK", 3)
    monkeypatch.setattr("layerpeel.cli.process.is_main_process", lambda: False)
    assert _printed(monkeypatch, capsys, error) == expected


@pytest.mark.parametrize(
    "error",
    [
        torch.distributed.DistBackendError("NCCL watchdog: timeout"),
        RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
    ],
)
def test_a_process_that_is_gone_is_no_bug_of_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: RuntimeError
) -> None:
    assert "a bug in layerpeel" in _printed(monkeypatch, capsys, error)
    monkeypatch.setattr("layerpeel.processes.distributed.WORLD_SIZE", 2)
    printed = _printed(monkeypatch, capsys, error)
    assert printed.startswith(f"error: another process is gone: {error}\nhint: its message tells why")


def _printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception) -> str:
    """What the command prints on stderr when it meets the error."""

    def fails(standalone_mode: bool) -> None:
        raise error

    monkeypatch.setattr("layerpeel.cli.process.app", fails)
    with pytest.raises(SystemExit):
        main()
    return capsys.readouterr().err


def _fail_in_another_process() -> None:
    def fails(*_: object) -> None:
        raise OSError("this disk is on fire")

    if RANK:
        from layerpeel.inference.layerwise import LayerwiseModel

        LayerwiseModel.begin = fails  # type: ignore[assignment, method-assign]
    sys.argv[0] = "layerpeel"
    main()


if __name__ == "__main__":
    _fail_in_another_process()
