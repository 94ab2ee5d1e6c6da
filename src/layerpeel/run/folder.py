"""The append-only record of a run: what was done, from which the run is resumed, read and reported.

NAME/journal.jsonl           one line an event, flushed and fsynced; the only truth
     config.yaml             the config, resolved; a copy for readers
     rounds/03/              scores.json, training.json, trained.safetensors (the student's own weights)
           .answers/         what tasks were answered in the round that is running
           .training.safetensors  the state of the training that is running
     student/                the Hugging Face checkpoint, with its model card
     report/                 the page, its figures and tables, and what was measured for it

Each line is sealed by a checksum that goes on from the line before, and holds the hashes of the files that its event
wrote. Events are `start`, `teacher`, for each round `scored` and `round`, `finish`; `resume` where a process went on;
`changed` (another config was accepted) and `back` (a file was damaged), which undo what came after round `to`.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from rich.markup import escape
from safetensors.torch import load_file, save_file

from layerpeel.config.run import RunConfig
from layerpeel.errors import InputError, RunError
from layerpeel.importance.scores import LayerScores
from layerpeel.inference.answer_cache import AnswerCache
from layerpeel.model.architecture import count_parameters
from layerpeel.model.devices import pick_device
from layerpeel.model.digests import digests
from layerpeel.model.surgery import KeptLayers
from layerpeel.processes.distributed import RANK, processes_of
from layerpeel.processes.interrupts import interruptible
from layerpeel.processes.progress import console
from layerpeel.storage.files import disk_is_full, full_disk_named, replace_folder, sha256_of, sweep, write_whole
from layerpeel.storage.hash_chain import append, checksum, cut_torn_line, read_events, to_line
from layerpeel.storage.lock import claim, is_claimed
from layerpeel.tasks.scores import Evaluation
from layerpeel.training.result import TrainingResult
from layerpeel.training.state import TrainingState
from layerpeel.training.student import Student

LIBRARIES = ("layerpeel", "torch", "transformers", "accelerate", "datasets", "tokenizers")
# What the rounds of a run were measured with and by: other values need another folder, `--accept-changes` or not.
FIXED = ("teacher", "dtype", "tasks", "aggregate")
REPORTED = ("scores.json", "training.json")  # of a round: only reports read them


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
        self.events = read_events(self.journal)
        self._tracked: Accelerator | None = None
        self._track_step = sum(event["training"]["steps"] + 1 for event in self.rounds)

    @classmethod
    @contextmanager
    def open(cls, config: RunConfig, *, accept_changes: bool = False) -> Iterator[Run]:
        """Starts a run in `config.output`, or goes on with the one there; for the time of the context no other can.

        Args:
            accept_changes: goes on with this config where it differs in other fields than FIXED.

        Raises:
            InputError: the folder holds something else, a run with another config or teacher, or one that another
                process works on; or it cannot be written to.
            RunError: files are damaged, or, in the context, the disk is full.
        """
        folder, processes = config.output, processes_of(pick_device(config.device))
        journal = folder / "journal.jsonl"
        with full_disk_named(folder), interruptible():
            if not RANK:
                _make(folder)
            processes.wait_for_everyone()
            with nullcontext(True) if RANK else claim(journal) as granted:
                if not granted:
                    raise InputError(
                        f"output: {folder} is being worked on by process {cls(folder)._worker}",
                        hint="wait for it, stop it, or name another folder (--set output=...)",
                    )
                if not RANK:
                    cut_torn_line(journal)
                    sweep(folder)
                processes.wait_for_everyone()
                run = cls(folder)
                run._begin(config, accept_changes)
                yield run

    def _begin(self, config: RunConfig, accept_changes: bool) -> None:
        """Starts, or finds out what of a run still holds."""
        versions = {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()}
        teacher = digests(config.teacher, trust_remote_code=config.trust_remote_code)
        if not self.events:
            self.record(
                "start",
                config=config.model_dump(mode="json"),
                teacher_files=teacher,
                versions=versions,
                machine=describe_machine(),
                trust_remote_code=config.trust_remote_code,
                process=os.getpid(),
            )
        else:
            self._check_config(config, accept_changes)
            self._check_teacher(teacher)
            self._check_files()
            if not self.finish:
                self._resume(versions)
        copy = self.folder / "config.yaml"
        if not RANK and (not copy.exists() or copy.read_bytes() != self.config_text.encode()):
            write_whole(copy, self.config_text)

    def _check_config(self, config: RunConfig, accept_changes: bool) -> None:
        now = config.model_dump(mode="json")
        differences = _differences(self.config.model_dump(mode="json") | {"output": now["output"]}, now)
        if not differences:
            return
        fixed = [name for name in differences if name.split(".")[0] in FIXED]
        if fixed or not accept_changes:
            also = "" if fixed else ", or go on with the change from here (--accept-changes)"
            raise InputError(
                f"output: {self.folder} holds another run: {'; '.join(list(differences.values())[:3])}",
                hint=f"name a new output folder, or undo the change to go on with that run{also}",
            )
        self.record("changed", to=len(self.rounds), config=now, changes=list(differences.values()))
        self.config = config

    def _check_teacher(self, now: dict[str, str]) -> None:
        there = next(event for event in self.events if event["event"] == "start")["teacher_files"]
        other = sorted(name for name in {**there, **now} if there.get(name) != now.get(name))
        if other:
            raise InputError(
                f"teacher: {self.config.teacher} is another than when the run began ({', '.join(other[:3])})",
                hint="bring the old files back, or name a new output folder (--set output=...)",
            )

    def _check_files(self) -> None:
        """Goes back to the last round whose files are as they were written, or to before the finish; names the rest."""
        if self.finish and (name := self._damaged(self.finish)):
            self._go_back(len(self.rounds), name)
        spoiled = {event["round"]: list(self._spoiled(event)) for event in self.rounds}
        needed = 2 if self.config.stop.min_quality else 1  # the last student above the floor may be the result
        while not self.finish:
            last = [(each["round"], name) for each in self.rounds[-needed:] for name in spoiled[each["round"]]]
            number, name = next((pair for pair in last if not pair[1].endswith(REPORTED)), (0, None))
            if not name:
                break
            self._go_back(number - 1, name)
        for event in self.rounds:
            for name in spoiled[event["round"]]:
                lost = "only reports read it" if name.endswith(REPORTED) else "that round cannot be exported any more"
                console.print(escape(f"{self.folder / name}: damaged or gone; {lost}"), soft_wrap=True)

    def _go_back(self, number: int, name: str) -> None:
        going = f"going on from the end of round {number}"
        console.print(escape(f"{self.folder / name}: damaged or gone; {going}"), soft_wrap=True)
        self.record("back", to=number, damaged=name)

    def _resume(self, versions: dict[str, str]) -> None:
        """Notes that a process goes on, and with which versions, if they are others."""
        before = next(event["versions"] for event in reversed(self.events) if "versions" in event)
        other = {name: now for name, now in versions.items() if before.get(name) != now}
        if other:
            said = ", ".join(f"{name} {before.get(name)} -> {now}" for name, now in other.items())
            console.print(f"versions have changed since the run was here last: {said}", style="yellow")
        self.record("resume", process=os.getpid(), **({"versions": versions, "changed": list(other)} if other else {}))

    @property
    def is_running(self) -> bool:
        """Whether a process of this machine works on the run (never, where files cannot be locked)."""
        return is_claimed(self.journal)

    @property
    def journal(self) -> Path:
        return self.folder / "journal.jsonl"

    @property
    def student_folder(self) -> Path:
        """Where the resulting checkpoint is, once the run has finished."""
        return self.folder / "student"

    @cached_property
    def config(self) -> RunConfig:
        """The config that holds now, as the journal has it."""
        event = next((event for event in reversed(self.events) if "config" in event), None)
        if event is None:
            raise InputError(f"{self.folder}: the run has not begun", hint="run it again: `layerpeel run`")
        return RunConfig.model_validate(event["config"])

    @property
    def config_text(self) -> str:
        """The config in YAML."""
        return yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @property
    def live(self) -> list[dict[str, Any]]:
        """The events that hold: all but those that a later one has undone."""
        live: list[dict[str, Any]] = []
        for event in self.events:
            if "to" in event:
                live = [e for e in live if (e.get("round") or 0) <= event["to"] and e["event"] != "finish"]
            live.append(event)
        return live

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
        """The finished rounds, in order: what was scored and removed, and what came of it."""
        scored = {event["round"]: event for event in self.live if event["event"] == "scored"}
        return [scored[event["round"]] | event for event in self.live if event["event"] == "round"]

    @property
    def scored(self) -> dict[str, Any] | None:
        """The running round's scores and the layer that they chose, if it has come so far."""
        event = self._last("scored")
        return event if event and event["round"] > len(self.rounds) else None

    @property
    def finish(self) -> dict[str, Any] | None:
        """The last event of a finished run: its `reason`, and the `round` whose student is the result."""
        return self._last("finish")

    def record(self, event: str, **fields: Any) -> None:
        """Appends an event, and returns once it is on the disk."""
        line = {"event": event, "time": round(time.time(), 3), **fields}
        line["checksum"] = checksum(line, self.events[-1]["checksum"] if self.events else "")
        if not RANK:
            append(self.journal, to_line(line))
        self.events.append(line)

    def record_teacher(self, student: Student, evaluation: Evaluation) -> None:
        """Appends the teacher's event, from a student that nothing has been removed from."""
        self.record(
            "teacher",
            layers=len(student.kept_layers),
            parameters=count_parameters(student.model),
            evaluation=evaluation.to_json(),
            **self._quality(evaluation, evaluation),
        )

    def record_scores(self, scores: LayerScores) -> None:
        """Appends the running round's scores, and with them the choice of the layer to remove."""
        self.record("scored", round=len(self.rounds) + 1, removed=scores.ranked()[0], scores=scores.to_json())

    def record_round(self, student: Student, training: TrainingResult, evaluation: Evaluation) -> None:
        """Writes a round's files, then its event; a round without its event never happened."""
        number, files = len(self.rounds) + 1, {}
        if not RANK:
            files = self._write_round(number, student, training)
        evaluated = self.evaluated(student, training, evaluation)
        self.record("round", round=number, kept=list(student.kept_layers.kept), **evaluated, files=files)
        self._clear()
        self.track({"layers": len(student.kept_layers), **{k: evaluated[k] for k in ("aggregate", "kept_quality")}})

    def record_finish(self, reason: str, student: Student, last_pass: dict[str, Any] | None) -> None:
        """Appends the last event, with the hashes of the checkpoint; its model card may be edited by hand."""
        paths = [path for path in sorted(self.student_folder.iterdir()) if path.name != "README.md"] if not RANK else []
        self.record(
            "finish",
            reason=reason,
            round=len(student.kept_layers.removed),
            layers=len(student.kept_layers),
            last_pass=last_pass,
            files=self._hashes(paths),
        )
        self._clear()

    def evaluated(self, student: Student, training: TrainingResult, evaluation: Evaluation) -> dict[str, Any]:
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
                cpu=pick_device(self.config.device).type == "cpu",
                log_with=self.config.trackers,
                project_dir=str(self.folder),
            )
            self._tracked.init_trackers("layerpeel")
        self._tracked.log(dict(values), step=self._track_step)
        self._track_step += 1

    def _write_round(self, number: int, student: Student, training: TrainingResult) -> dict[str, str]:
        """Writes what an event has no room for; gives its hashes."""
        assert self.scored
        folder = self._round_folder(number)
        partial = folder.with_name(f".{folder.name}.partial")
        partial.mkdir(parents=True)
        _write_json(partial / "scores.json", self.scored["scores"])
        _write_json(partial / "training.json", training.summary() | {"curve": training.curve})
        save_file({k: v.contiguous() for k, v in student.trained_state().items()}, partial / "trained.safetensors")
        replace_folder(partial, folder)
        return self._hashes(folder.iterdir())

    def _clear(self) -> None:
        """Removes what only the round that was running needed."""
        if not RANK:
            shutil.rmtree(self._answers_folder, ignore_errors=True)
        self.training_state().clear()

    def answers(self) -> AnswerCache:
        """What tasks were answered in the round that is running; kept until the round is recorded."""
        return AnswerCache(self._answers_folder / f"{RANK}.jsonl", f"round {len(self.rounds) + 1}")

    def training_state(self) -> TrainingState:
        """Where the training that is running saves how far it is: that of a removal, or the one after the last."""
        since = next((event["checksum"] for event in reversed(self.live) if "round" in event), "")
        return TrainingState(self.folder / "rounds" / ".training.safetensors", since, self.config.distill.save_every)

    def restore(self, student: Student, number: int | None = None) -> None:
        """Brings a fresh student to where a round (the last one, unless named) left it.

        Raises:
            RunError: the round's files are gone or damaged.
        """
        number = len(self.rounds) if number is None else number
        if not number:
            return
        event = self.rounds[number - 1]
        self.check_files(event)
        student.remove(set(student.kept_layers.kept) - set(event["kept"]))
        student.load_trained(load_file(self._round_folder(number) / "trained.safetensors"))

    def check_files(self, event: Mapping[str, Any]) -> None:
        """Checks the weights and the checkpoint that an event says were written.

        Raises:
            RunError: it names the file that is gone, or is not as it was written.
        """
        if name := self._damaged(event):
            raise RunError(
                f"{self.folder / name}: damaged or gone",
                hint="bring it back from a copy; or start again in a new output folder",
            )

    def _damaged(self, event: Mapping[str, Any]) -> str | None:
        """The first of an event's files that is not as it was written; what is only read in reports is no matter."""
        return next((name for name in self._spoiled(event) if not name.endswith(REPORTED)), None)

    def _spoiled(self, event: Mapping[str, Any]) -> Iterator[str]:
        """Those of an event's files that are not as they were written."""
        return (name for name, digest in event["files"].items() if sha256_of(self.folder / name) != digest)

    def _hashes(self, paths: Iterable[Path]) -> dict[str, str]:
        return {path.relative_to(self.folder).as_posix(): str(sha256_of(path)) for path in sorted(paths)}

    def curve(self, event: Mapping[str, Any]) -> list[dict[str, float]]:
        """The training curve of a round; empty if its file is gone, or not as it was written."""
        name = f"rounds/{event['round']:02d}/training.json"
        if sha256_of(self.folder / name) != event["files"].get(name):
            return []
        found: list[dict[str, float]] = json.loads((self.folder / name).read_text(encoding="utf-8"))["curve"]
        return found

    @property
    def _worker(self) -> Any:
        """The process that worked on the run last."""
        return next((event["process"] for event in reversed(self.events) if "process" in event), "another")

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
        return next((event for event in reversed(self.live) if event["event"] == kind), None)


def describe_machine() -> dict[str, Any]:
    """What measured times depend on."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count(), "gpus": gpus}


def _make(folder: Path) -> None:
    """Makes a folder with an empty journal, if there is none yet.

    Raises:
        InputError: it holds something else, or cannot be written to.
    """
    journal = folder / "journal.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.iterdir()):
            journal.touch()
        if journal.is_file():
            journal.open("ab").close()
            return
    except OSError as error:
        if disk_is_full(error):
            raise
        raise InputError(
            f"output: {folder} cannot be written to ({error.strerror})",
            hint="name a folder that can (--set output=...), or change its permissions",
        ) from None
    raise InputError(
        f"output: {folder} is not empty, and what it holds is no run",
        hint="name a new or an empty folder (--set output=...)",
    )


def _differences(there: Any, now: Any, where: str = "") -> dict[str, str]:
    """By the name of the field, what it was and is."""
    if isinstance(there, dict) and isinstance(now, dict):
        found: dict[str, str] = {}
        for key in {**there, **now}:
            found |= _differences(there.get(key), now.get(key), f"{where}.{key}".lstrip("."))
        return found
    return {} if there == now else {where: f"{where} is {there!r} there and {now!r} in this config"}


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")


def removed_layers(run: Run, number: int) -> tuple[int, ...]:
    """The teacher layers that a round's student no longer has."""
    assert run.teacher
    return KeptLayers(tuple(run.rounds[number - 1]["kept"]), run.teacher["layers"]).removed if number else ()
