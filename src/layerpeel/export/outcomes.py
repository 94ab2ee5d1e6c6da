"""What came of a student in a runtime, and how its run remembers it."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerpeel.errors import reason_of
from layerpeel.export.verify.gguf_header import read_header
from layerpeel.export.verify.runtimes import runtime_of
from layerpeel.export.verify.verifying import Verdict
from layerpeel.processes.progress import console, shown
from layerpeel.report.runtimes import RuntimeSpeed, VerifiedRow, keep_row, student_mark
from layerpeel.run.folder import Run
from layerpeel.run.machine import describe_machine
from layerpeel.storage.outputs import absolute

WEIGHTS = (".onnx", ".onnx_data", ".bin")  # suffixes of files in folders that hold no safetensors


@dataclass(frozen=True)
class Outcome:
    """A file, folder or server, and what came of verifying it.

    Attributes:
        path: of it, or its address.
        verdict: whether it computes the student.
        speed: beside the teacher's, if it was timed.
        teacher_bytes: of the teacher's weights in the same form, if it was timed.
    """

    path: str
    verdict: Verdict
    speed: RuntimeSpeed | None = None
    teacher_bytes: int | None = None

    def to_json(self) -> dict[str, Any]:
        timed = {"speed": asdict(self.speed), "teacher_bytes": self.teacher_bytes} if self.speed else {}
        return self.verdict.to_json() | timed


def remember(run: Run, round_: int | None, outcome: Outcome) -> None:
    """Keeps an outcome beside the run whose student it is of.

    Args:
        round_: whose student; the run's result, if None.
    """
    assert run.teacher
    number = run.result_round if round_ is None else round_
    last_pass = round_ is None and run.last_pass is not None
    served = outcome.path.startswith(("http://", "https://"))
    row = VerifiedRow(
        runtime=outcome.verdict.runtime,
        kind=kind_of(outcome.path),
        path=outcome.path if served else str(absolute(Path(outcome.path).expanduser())),
        round=number,
        last_pass=last_pass,
        layers=run.teacher.layers - number,
        teacher_layers=run.teacher.layers,
        precision=outcome.verdict.precision,
        right=outcome.verdict.is_right,
        mean_kl=outcome.verdict.comparison.mean_kl,
        same_top=outcome.verdict.comparison.same_top_share,
        bytes=bytes_of(Path(outcome.path).expanduser()),
        teacher_bytes=outcome.teacher_bytes,
        speed=outcome.speed,
        student=student_mark(run, number, last_pass),
        machine=describe_machine(),
        time=time.time(),
    )
    try:
        keep_row(run, row)
    except OSError as error:  # a run that may only be read; what was found is printed all the same
        console.print(f"not kept beside the run: {shown(reason_of(error))}", style="yellow", soft_wrap=True)


def kind_of(path: str) -> str:
    """What a runtime was given: the quantisation of a GGUF file, `safetensors`, `onnx`, `openvino` or `server`."""
    if path.startswith(("http://", "https://")):
        return "server"
    place = Path(path).expanduser()
    if place.is_file():
        return read_header(place).kind
    runtime = runtime_of(place, None)
    return "safetensors" if runtime == "transformers" else runtime


def bytes_of(path: Path) -> int | None:
    """Of a file, or of the weights in a folder; None of a server."""
    if path.is_file():
        return path.stat().st_size
    files = list(path.glob("*.safetensors")) or [each for each in path.glob("*") if each.suffix in WEIGHTS]
    return sum(file.stat().st_size for file in files) or None
