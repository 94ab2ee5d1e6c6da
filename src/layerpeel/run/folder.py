"""The folder of a run, opened to read.

NAME/journal.jsonl           one line an event, flushed and fsynced; the only truth
     config.yaml             the config, resolved; a copy for readers
     rounds/03/              scores.json, training.json, trained.safetensors (the student's trained weights)
           .answers/         what tasks were answered in the round that is running
           .repair/          the projections that the repair which is running has solved
           .training/        the state of the training that is running, a file for each process with a part of it
     text/teacher-HASH/      text that the teacher wrote, as token ids (see `data.token_documents`)
          tokens-HASH/       all text that the run reads, as token ids, until it ends (see `data.token_store`)
     student/                the Hugging Face checkpoint, with its model card
     report/                 the page, its figures and tables, what was measured for it, and what was verified of the
                             students in other runtimes

Each line of the journal has a checksum that covers the lines before it, and the hashes of the files that its event
wrote (see `run.events`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import yaml
from safetensors.torch import load_file
from transformers import PreTrainedModel

from layerpeel.config.fields import TextConfig
from layerpeel.config.run import RunConfig
from layerpeel.errors import InputError, RunError
from layerpeel.inference.layerwise import LayerwiseModel
from layerpeel.model.tensor_files import tensors_in
from layerpeel.run.events import AnyEvent, Finish, RoundEnd, check_version, event_from_json
from layerpeel.run.record import Round, RunRecord
from layerpeel.run.results_json import curve_from_json
from layerpeel.storage.files import sha256_of
from layerpeel.storage.hash_chain import read_events
from layerpeel.storage.lock import is_claimed
from layerpeel.training.student import Student

WEIGHTS, TRAINING, SCORES = "trained.safetensors", "training.json", "scores.json"  # the files of a round
REPORTED = (SCORES, TRAINING)  # of these: only reports read them


class Run(RunRecord):
    """The folder of a finished or running run: what its journal records, and the files beside it.

    Attributes:
        folder: where the run is.
        events: the journal's events, oldest first.
        located: the config with the places where things are now, if they are not where they were (`run.places`).
    """

    located: RunConfig | None = None

    def __init__(self, folder: str | Path) -> None:
        """Reads the journal.

        Raises:
            InputError: the folder holds no run, or one of another version of the record.
            RunError: the journal is damaged.
        """
        self.folder = Path(folder)
        if not self.journal.is_file():
            raise InputError(
                f"{folder} holds no run: there is no journal.jsonl in it",
                hint="give the output folder of a layerpeel run",
            )
        super().__init__(_read_journal(self.journal), str(folder))

    @property
    def config(self) -> RunConfig:
        return self.located or super().config

    @property
    def journal(self) -> Path:
        return self.folder / "journal.jsonl"

    @property
    def student_folder(self) -> Path:
        """Where the resulting checkpoint is, once the run has finished."""
        return self.folder / "student"

    @property
    def text_folder(self) -> Path:
        """Where the texts are that the teacher writes, and the token ids of those that are read."""
        return self.folder / "text"

    @property
    def kept_texts(self) -> list[TextConfig]:
        """The texts that the teacher wrote, as sources to read."""
        return [TextConfig(path=str(self.folder / each.folder)) for each in self.teacher_texts]

    def round_folder(self, number: int) -> Path:
        """Where the files of a round are."""
        return self.folder / "rounds" / f"{number:02d}"

    @property
    def is_running(self) -> bool:
        """Whether a process of this machine works on the run (never, where files cannot be locked)."""
        return is_claimed(self.journal)

    @property
    def config_text(self) -> str:
        """The config in YAML."""
        return yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def curve(self, finished: Round) -> list[dict[str, float]]:
        """The training curve of a round; empty if its file is gone, or not as it was written."""
        path = self.round_folder(finished.number) / TRAINING
        if sha256_of(path) != finished.files.get(path.relative_to(self.folder).as_posix()):
            return []
        return curve_from_json(json.loads(path.read_text(encoding="utf-8")))

    def student_of(self, teacher: PreTrainedModel | LayerwiseModel, number: int) -> Student:
        """The student as a round left it; that of round 0 is the teacher.

        Raises:
            RunError: the round's files are gone or damaged.
        """
        student = Student(teacher)
        self.restore(student, number)
        return student

    def restore(self, student: Student, number: int | None = None) -> None:
        """Brings a student that has lost no layer to where a round (the last one, unless named) left it.

        Raises:
            RunError: the round's files are gone or damaged.
        """
        number = len(self.rounds) if number is None else number
        if not number:
            return
        finished = self.rounds[number - 1]
        self.check_files(finished)
        student.remove(set(student.kept_layers.kept) - set(finished.kept))
        path = self.round_folder(number) / WEIGHTS
        if student.teacher.streamed:
            student.keep_on_disk(tensors_in(path))
        else:
            student.load_trained(load_file(path))

    def check_files(self, event: Round | RoundEnd | Finish) -> None:
        """Checks the weights and the checkpoint that were written with an event.

        Raises:
            RunError: it names the file that is gone, or is not as it was written.
        """
        if name := self.damaged_file(event):
            raise RunError(
                f"{self.folder / name}: damaged or gone",
                hint="bring it back from a copy; or start again in a new output folder",
            )

    def damaged_file(self, event: Round | RoundEnd | Finish) -> str | None:
        """The first of an event's files that is not as it was written, but for those that only reports read."""
        return next((name for name in self.damaged_files(event) if not name.endswith(REPORTED)), None)

    def damaged_files(self, event: Round | RoundEnd | Finish) -> Iterator[str]:
        """Those of an event's files that are gone, or not as they were written, by their path in the folder."""
        return (name for name, digest in event.files.items() if sha256_of(self.folder / name) != digest)


def _read_journal(path: Path) -> list[AnyEvent]:
    try:
        return [event_from_json(event, str(path)) for event in read_events(path)]
    except RunError:
        _refuse_first_edition(path)
        raise


def _refuse_first_edition(path: Path) -> None:
    """Refuses a journal of the first edition, whose checksums had another name.

    Raises:
        InputError: it is one.
    """
    try:
        start = json.loads(path.read_bytes().split(b"\n")[0])
    except ValueError:
        return
    if isinstance(start, dict) and start.get("event") == "start" and not {"version", "checksum"} & set(start):
        check_version(start, str(path))
