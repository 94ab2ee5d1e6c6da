"""The append-only record of a run: what was done, from which the run is resumed, read and reported.

NAME/config.yaml             the config, resolved
     journal.jsonl           one line an event, flushed and fsynced; the only truth
     rounds/03/              scores.json, training.json, trained.safetensors (the student's own weights)
     student/                the Hugging Face checkpoint, with its model card
     report/                 the page, its figures and tables, and what was measured for it
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
import weakref
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from layerpeel.config import RunConfig
from layerpeel.errors import InputError, RunError
from layerpeel.files import replace_folder, write_whole
from layerpeel.importance import LayerScores
from layerpeel.models import count_parameters, pick_device
from layerpeel.parallel import processes_of
from layerpeel.progress import RANK
from layerpeel.student import Student
from layerpeel.tasks.base import Evaluation
from layerpeel.tasks.store import AnswerStore
from layerpeel.training import TrainingResult

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LIBRARIES = ("layerpeel", "torch", "transformers", "accelerate", "datasets", "tokenizers")


class Run:
    """A finished or running journal.

    Attributes:
        folder: the run's folder.
        events: the journal's events, oldest first.
    """

    def __init__(self, folder: str | Path) -> None:
        """Opens a run to read it.

        Raises:
            InputError: the folder holds no run.
        """
        self.folder = Path(folder)
        if not self.journal.is_file():
            raise InputError(
                f"{folder} holds no run: there is no journal.jsonl in it",
                hint="give the output folder of a layerpeel run",
            )
        self.events = _read_events(self.journal)
        self._tracked: Accelerator | None = None
        self._track_step = sum(event["training"]["steps"] + 1 for event in self.rounds)

    @classmethod
    def open(cls, config: RunConfig) -> Run:
        """Starts a run in `config.output`, or goes on with the one that is there.

        Raises:
            InputError: the folder holds something else, or a run with another config.
        """
        folder, processes = config.output, processes_of(pick_device(config.device))
        if not RANK and (not folder.exists() or not any(folder.iterdir())):
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "config.yaml", _dump(config))
            (folder / "journal.jsonl").touch()
        processes.wait_for_everyone()
        if not (folder / "journal.jsonl").is_file():
            raise InputError(
                f"output: {folder} is not empty, and what it holds is no run",
                hint="name a new or an empty folder (--set output=...)",
            )
        run = cls(folder)
        _check_same(folder, config)
        if not RANK:
            _cut_torn_line(run.journal)
        claim = os.open(run.journal, os.O_RDONLY)  # as long as this object lives: see `is_running`
        weakref.finalize(run, os.close, claim)
        _lock(claim, exclusive=False)
        if not run.events:
            run.record(
                "start",
                versions={name: version(name) for name in LIBRARIES} | {"python": platform.python_version()},
                machine=describe_machine(),
                trust_remote_code=config.trust_remote_code,
            )
        return run

    @property
    def is_running(self) -> bool:
        """Whether a process of this machine works on the run (never, where files cannot be locked)."""
        with self.journal.open("rb") as file:
            return not _lock(file.fileno(), exclusive=True)

    @property
    def journal(self) -> Path:
        return self.folder / "journal.jsonl"

    @property
    def student_folder(self) -> Path:
        """Where the resulting checkpoint is, once the run has finished."""
        return self.folder / "student"

    @cached_property
    def config(self) -> RunConfig:
        return RunConfig.model_validate(yaml.safe_load((self.folder / "config.yaml").read_text(encoding="utf-8")))

    @property
    def teacher(self) -> dict[str, Any] | None:
        """The teacher's event: layers, parameters, evaluation, aggregate."""
        return self._last("teacher")

    @property
    def reference(self) -> Evaluation:
        """The teacher's evaluation."""
        assert self.teacher
        return Evaluation.from_json(self.teacher["evaluation"])

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The finished rounds, in order."""
        return [event for event in self.events if event["event"] == "round"]

    @property
    def finish(self) -> dict[str, Any] | None:
        """The last event of a finished run: its `reason`, and the `round` whose student is the result."""
        return self._last("finish")

    def record(self, event: str, **fields: Any) -> None:
        """Appends an event, and returns once it is on the disk."""
        line = {"event": event, "time": round(time.time(), 3), **fields}
        if not RANK:
            with self.journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.events.append(line)

    def record_teacher(self, student: Student, evaluation: Evaluation) -> None:
        """Appends the teacher's event, from a student that nothing has been removed from."""
        self.record(
            "teacher", layers=len(student.depth), parameters=count_parameters(student.model),
            evaluation=evaluation.to_json(), **self._quality(evaluation, evaluation),
        )  # fmt: skip

    def record_round(
        self,
        student: Student,
        removed: int,
        scores: LayerScores,
        training: TrainingResult,
        evaluation: Evaluation,
    ) -> None:
        """Writes a round's files, then its event; a round without its event never happened."""
        if not RANK:
            self._write_round(len(self.rounds) + 1, student, scores, training)
        judged = self.judged(student, training, evaluation)
        self.record(
            "round", round=len(self.rounds) + 1, removed=removed, kept=list(student.depth.kept),
            scores=scores.to_json(), **judged,
        )  # fmt: skip
        self.track({"layers": len(student.depth), **{k: judged[k] for k in ("aggregate", "kept_quality")}})

    def judged(self, student: Student, training: TrainingResult, evaluation: Evaluation) -> dict[str, Any]:
        """What an event says of a student: its size, how it was trained, and its quality beside the teacher's."""
        return {
            "parameters": count_parameters(student.model),
            "training": training.summary(),
            "evaluation": evaluation.to_json(),
            **self._quality(evaluation, self.reference),
        }

    def track(self, values: Mapping[str, float]) -> None:
        """Sends numbers to the trackers that the config names."""
        if not self.config.trackers:
            return
        if self._tracked is None:
            self._tracked = Accelerator(
                cpu=pick_device(self.config.device).type == "cpu", log_with=self.config.trackers,
                project_dir=str(self.folder),
            )  # fmt: skip
            self._tracked.init_trackers("layerpeel")
        self._tracked.log(dict(values), step=self._track_step)
        self._track_step += 1

    def _write_round(self, number: int, student: Student, scores: LayerScores, training: TrainingResult) -> None:
        partial = self.folder / "rounds" / f".{number:02d}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_json(partial / "scores.json", scores.to_json())
        _write_json(partial / "training.json", training.summary() | {"curve": training.curve})
        save_file({k: v.contiguous() for k, v in student.owned_state().items()}, partial / "trained.safetensors")
        replace_folder(partial, self._round_folder(number))
        shutil.rmtree(self._answers_folder, ignore_errors=True)

    def answers(self) -> AnswerStore:
        """What tasks were answered in the round that is running; kept until the round is recorded."""
        return AnswerStore(self._answers_folder / f"{RANK}.jsonl", f"round {len(self.rounds) + 1}")

    def restore(self, student: Student, number: int | None = None) -> None:
        """Brings a fresh student to where a round (the last one, unless named) left it.

        Raises:
            RunError: the round's files are gone or damaged.
        """
        number = len(self.rounds) if number is None else number
        if not number:
            return
        student.remove(set(student.depth.kept) - set(self.rounds[number - 1]["kept"]))
        path = self._round_folder(number) / "trained.safetensors"
        try:
            student.load_owned(load_file(path))
        except Exception as error:
            raise RunError(
                f"{path}: the weights of round {number} cannot be read ({error})",
                hint="start again in a new output folder",
            ) from None

    def _quality(self, evaluation: Evaluation, reference: Evaluation) -> dict[str, float]:
        """The aggregate, and its share of the teacher's."""
        how = self.config.aggregate
        own, whole = evaluation.aggregate(reference, how), reference.aggregate(reference, how)
        return {"aggregate": own, "kept_quality": own / whole if whole else 1.0}

    def _round_folder(self, number: int) -> Path:
        return self.folder / "rounds" / f"{number:02d}"

    @property
    def _answers_folder(self) -> Path:
        return self.folder / "rounds" / ".answers"

    def _last(self, kind: str) -> dict[str, Any] | None:
        return next((event for event in reversed(self.events) if event["event"] == kind), None)


def describe_machine() -> dict[str, Any]:
    """What measured times depend on."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count(), "gpus": gpus}


def _read_events(journal: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; the last may be torn by a crash, or be on its way."""
    content = journal.read_bytes()
    try:
        return [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
    except ValueError as error:
        raise RunError(f"{journal}: a line is damaged ({error})", hint="start again in a new output folder") from None


def _cut_torn_line(journal: Path) -> None:
    content = journal.read_bytes()
    os.truncate(journal, content.rfind(b"\n") + 1)


def _lock(file: int, *, exclusive: bool) -> bool:
    """Takes a lock that ends with the descriptor or the process; False if another one is in the way of an exclusive."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
    except BlockingIOError:
        return False
    except OSError:  # some file systems know no locks
        return True
    return True


def _check_same(folder: Path, config: RunConfig) -> None:
    there = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    differences = _differences(there, yaml.safe_load(_dump(config)))
    if differences:
        raise InputError(
            f"output: {folder} holds another run: {'; '.join(differences[:3])}",
            hint="name a new output folder, or undo the change to go on with that run",
        )


def _differences(there: Any, now: Any, where: str = "") -> list[str]:
    if isinstance(there, dict) and isinstance(now, dict):
        return [
            difference
            for key in {**there, **now}
            for difference in _differences(there.get(key), now.get(key), f"{where}.{key}".lstrip("."))
        ]
    return [] if there == now else [f"{where} is {there!r} there and {now!r} in this config"]


def _dump(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
