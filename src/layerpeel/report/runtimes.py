"""What was verified of a run's students in other runtimes, and the file in the run's folder that keeps it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from layerpeel.report.rows import TableRow
from layerpeel.run.events import Machine
from layerpeel.run.folder import Run
from layerpeel.storage.files import json_digest, write_whole


@dataclass(frozen=True)
class Rates:
    """Tokens a second of a teacher and of its student, timed in turns.

    Attributes:
        teacher, student: medians over the turns.
        ratio: the student's to the teacher's, median over the turns.
    """

    teacher: float
    student: float
    ratio: float


@dataclass(frozen=True)
class RuntimeSpeed:
    """How fast a student is in a runtime beside its teacher, one row at a time.

    Attributes:
        prompt_tokens, new_tokens: that were read, and generated after them.
        turns: how often each was timed.
        prompt: of reading.
        generation: of writing.
    """

    prompt_tokens: int
    new_tokens: int
    turns: int
    prompt: Rates
    generation: Rates


@dataclass(frozen=True)
class VerifiedRow(TableRow):
    """A student as a runtime computes it.

    Attributes:
        runtime: its name and version.
        kind: of the file: the quantisation of a GGUF file, `safetensors`, `onnx`, `openvino`, `server`.
        path: where the file was, or the server's address.
        round: whose student it is; with `last_pass`, after the training that followed the last removal.
        layers, teacher_layers: how many student and teacher have.
        precision: whose limits counted.
        right: the verdict.
        mean_kl: KL(student || runtime) of the next token, in nats.
        same_top: share of positions with the same most likely token.
        bytes, teacher_bytes: of the weights' files; None where that is not known.
        speed: None if it was not timed; in files, a column for each rate.
        student: tells the student from that of another run with the same number of layers; not in files.
        machine, time: where, and when in seconds since the epoch; not in files.
    """

    runtime: str
    kind: str
    path: str
    round: int
    last_pass: bool
    layers: int
    teacher_layers: int
    precision: str
    right: bool
    mean_kl: float
    same_top: float
    bytes: int | None
    teacher_bytes: int | None
    speed: RuntimeSpeed | None
    student: str
    machine: Machine
    time: float

    @property
    def name(self) -> str:
        """The runtime's, without its version."""
        return re.sub(r" [vb]?\d[\w.+-]*$", "", self.runtime)

    @property
    def layers_ratio(self) -> float:
        """How many times as fast the student would be if layers were all that takes time."""
        return self.teacher_layers / self.layers

    def columns(self) -> dict[str, Any]:
        columns = super().columns()
        for name in ("speed", "student", "machine", "time"):
            del columns[name]
        for part in ("prompt", "generation"):
            rates = asdict(getattr(self.speed, part)) if self.speed else dict.fromkeys(("teacher", "student", "ratio"))
            columns |= {f"{part} {name}": value for name, value in rates.items()}
        return columns | {"layers ratio": self.layers_ratio}

    def replaces(self, other: VerifiedRow) -> bool:
        """Whether the other row says the same of an older state."""
        return all(getattr(self, name) == getattr(other, name) for name in ("name", "kind", "round", "last_pass"))


_FILE = TypeAdapter(list[VerifiedRow])


def runtimes_path(run_folder: Path) -> Path:
    return run_folder / "report" / "runtimes.json"


def student_mark(run: Run, number: int, last_pass: bool) -> str:
    """Tells the student of a round from another that a run which went back has made since."""
    files = run.finish.files if run.finish and last_pass else run.rounds[number - 1].files if number else {}
    weights = {name: digest for name, digest in files.items() if name.endswith(".safetensors")}
    return json_digest([run.removed_layers(number), weights])


def verified_rows(run: Run) -> list[VerifiedRow]:
    """What was verified of the students that the run has now: the deepest last."""
    numbers = range(len(run.rounds) + 1)
    rows = [
        row
        for row in _read(runtimes_path(run.folder))
        if row.round in numbers and row.student == student_mark(run, row.round, row.last_pass)
    ]
    return sorted(rows, key=lambda row: (row.round, row.last_pass, row.name, -(row.bytes or 0)))


def keep_row(run: Run, row: VerifiedRow) -> None:
    """Adds a row to the run's file, in place of an older one; what was timed of the same file stays.

    Raises:
        OSError: the run's folder cannot be written to.
    """
    path, rows = runtimes_path(run.folder), _read(runtimes_path(run.folder))
    before = next((other for other in rows if row.replaces(other)), None)
    if before and not row.speed and _same_file(row, before):
        row = replace(row, speed=before.speed, teacher_bytes=before.teacher_bytes)
    rows = [*(other for other in rows if not row.replaces(other)), row]
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps(_FILE.dump_python(rows, mode="json"), ensure_ascii=False, indent=1) + "\n")


def _same_file(row: VerifiedRow, other: VerifiedRow) -> bool:
    same = ("runtime", "bytes", "student", "machine")
    return all(getattr(row, name) == getattr(other, name) for name in same)


def _read(path: Path) -> list[VerifiedRow]:
    """The rows of a file; none if there is no such file, or it is damaged."""
    try:
        return _FILE.validate_json(path.read_bytes())
    except (OSError, ValueError):
        return []
