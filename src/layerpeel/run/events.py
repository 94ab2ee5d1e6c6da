"""The events of a run: one class each, and the only reader and writer of their JSON.

An event is one line of `journal.jsonl`: the fields of its class, its `event` (which class it is), its `time` in seconds
since 1970, and the checksum that `storage.hash_chain` adds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, TypeAdapter, ValidationError

from layerpeel.config.run import RunConfig
from layerpeel.errors import InputError, RunError
from layerpeel.importance.scores import LayerScores
from layerpeel.run.results_json import evaluation_from_json, evaluation_to_json, scores_from_json, scores_to_json
from layerpeel.tasks.scores import Evaluation
from layerpeel.training.result import RepairResult, TrainingSummary

VERSION = 2
"""Of the record's form; a run of another version is refused."""

EvaluationField = Annotated[Evaluation, BeforeValidator(evaluation_from_json), PlainSerializer(evaluation_to_json)]
ScoresField = Annotated[LayerScores, BeforeValidator(scores_from_json), PlainSerializer(scores_to_json)]


class Part(BaseModel):
    """A part of the record; it does not change once it is written."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        arbitrary_types_allowed=True,
        ser_json_inf_nan="constants",
    )


class Event(Part):
    """What every line of the journal has."""

    time: float = Field(default_factory=lambda: round(time.time(), 3))
    """Seconds since 1970."""
    checksum: str = Field(default="", exclude=True)
    """Of its line in the journal; it covers the lines before it, too. Empty until the event is recorded."""


class Machine(Part):
    """What measured times depend on."""

    system: str = ""
    """The operating system and its version."""
    processor: str = ""
    """The processor's architecture."""
    cores: int | None = None
    """Of the processor."""
    gpus: list[str] = []
    """Their names."""


class DataDigests(Part):
    """What the data of a run are, wherever they lie; what cannot be told is left out."""

    tasks: dict[str, str] = {}
    """A digest of the rows of each task, by its name."""
    text: dict[str, str] = {}
    """A digest of each text, or the commit of a hub dataset, by its place in the config (`distill.text.0`)."""


class Start(Event):
    """A run begins."""

    event: Literal["start"] = "start"
    version: int = VERSION
    """Of the record's form."""
    config: RunConfig
    """The config, resolved."""
    teacher_files: dict[str, str]
    """A digest of each of the teacher's files, or the commit of a hub name."""
    data: DataDigests = DataDigests()
    """Of the tasks and the text."""
    folder: str = ""
    """The run's folder, from which places in it are found again if all of them are moved together."""
    versions: dict[str, str]
    """Of Python and the libraries."""
    machine: Machine
    """Where it runs."""
    trust_remote_code: bool = False
    """Whether code that came with the checkpoint may run."""
    process: int
    """The process that works on the run."""


class Quality(Part):
    """How good a model is, beside the teacher."""

    parameters: int
    """How many it has; tied ones count once."""
    evaluation: EvaluationField
    """Its scores on the tasks."""
    aggregate: float
    """Of its scores, as `aggregate` in the config says."""
    kept_quality: float
    """Its aggregate as a share of the teacher's."""


class TeacherRecord(Event, Quality):
    """The teacher was measured."""

    event: Literal["teacher"] = "teacher"
    layers: int
    """How many it has."""
    attention: str = ""
    """The kernel of attention that ran, as transformers calls it."""


class TeacherText(Event):
    """The teacher has written a text, and it is on the disk."""

    event: Literal["teacher_text"] = "teacher_text"
    folder: str
    """Where it is, in the run's folder."""
    documents: int
    """How many."""
    tokens: int
    """Of all documents, with what they begin with."""
    tokens_per_second: float
    """At which it was written."""
    ended: float
    """The share of the documents that the teacher ended; the others were cut at `distill.sequence_length`."""
    empty: float
    """The share of those that it ended at once."""
    looping: float
    """The share of those that repeat themselves over and over."""
    alike: float
    """The share of the most frequent beginning."""
    samples: list[str]
    """The beginnings of a few documents."""


class Scored(Event):
    """The layers were scored, and with that the next to go was chosen."""

    event: Literal["scored"] = "scored"
    round: int
    """Counted from 1."""
    removed: int
    """The teacher layer that goes."""
    scores: ScoresField
    """What the metrics said."""


class StudentRecord(Quality):
    """A student that was trained and measured."""

    repair: RepairResult | None = None
    """What its repair in closed form did, if there was one."""
    training: TrainingSummary
    """What its training did."""


class RoundEnd(Event, StudentRecord):
    """A round is over, and its files are on the disk."""

    event: Literal["round"] = "round"
    round: int
    """Counted from 1."""
    kept: tuple[int, ...]
    """Teacher layers that the student still has, ascending."""
    files: dict[str, str]
    """The SHA-256 of each file of the round, by its path in the run's folder."""


class Finish(Event):
    """A run is over, and the student is on the disk."""

    event: Literal["finish"] = "finish"
    reason: str
    """The stop that held (`target_layers`, `min_quality`, `max_params`), or `no_candidates`."""
    round: int
    """The round whose student is the result; 0: the teacher."""
    layers: int
    """Of the result."""
    last_pass: StudentRecord | None
    """The result after the training that followed the last removal, if there was one."""
    files: dict[str, str]
    """The SHA-256 of each file of the checkpoint, by its path in the run's folder."""


class Finding(Event):
    """A check found a sign of failure."""

    event: Literal["finding"] = "finding"
    check: str
    """Which check."""
    severity: Literal["error", "warning", "note"]
    """How bad it is."""
    round: int | None
    """In which round; None: of the teacher."""
    message: str
    """What was found."""
    hint: str
    """What to do."""


class Resume(Event):
    """A process went on with the run."""

    event: Literal["resume"] = "resume"
    process: int
    """Which one."""
    versions: dict[str, str] | None = None
    """Of Python and the libraries, if they are others than before."""
    changed: list[str] = []
    """Those of them that are."""


class Changed(Event):
    """Another config was accepted; what came after round `to` is undone."""

    event: Literal["changed"] = "changed"
    to: int
    """The last round that still holds."""
    config: RunConfig
    """The config from here on."""
    changes: list[str]
    """What is other, in words."""
    data: DataDigests = DataDigests()
    """Of the tasks and the text, from here on."""
    folder: str = ""
    """The run's folder."""


class Moved(Event):
    """The teacher, text or tasks lie elsewhere, with the same content."""

    event: Literal["moved"] = "moved"
    config: RunConfig
    """The config, with the places from here on."""
    folder: str
    """The run's folder."""


class Back(Event):
    """A file was damaged or gone; what came after round `to` is undone."""

    event: Literal["back"] = "back"
    to: int
    """The last round that still holds."""
    damaged: str
    """The file's path in the run's folder."""


AnyEvent = Start | TeacherRecord | TeacherText | Scored | RoundEnd | Finish | Finding | Resume | Changed | Moved | Back
_EVENT: TypeAdapter[AnyEvent] = TypeAdapter(Annotated[AnyEvent, Field(discriminator="event")])


def event_to_json(event: AnyEvent) -> dict[str, Any]:
    """The event as a line of the journal holds it, but for its checksum."""
    return event.model_dump(mode="json")


def event_from_json(value: Mapping[str, Any], where: str) -> AnyEvent:
    """The event in a line of a journal.

    Args:
        where: what the message of an error begins with.

    Raises:
        InputError: the run is of another version of the record.
        RunError: it is no event.
    """
    if value.get("event") == "start":
        check_version(value, where)
    try:
        return _EVENT.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise RunError(
            f"{where}: no event of a run ({field}: {first['msg']})", hint="start in a new output folder"
        ) from None


def check_version(start: Mapping[str, Any], where: str) -> None:
    """Refuses a run whose start event is of another version of the record (the first had none).

    Raises:
        InputError: it is.
    """
    if start.get("version") != VERSION:
        raise InputError(
            f"{where}: the run was made by another version of layerpeel (its record is of form "
            f"{start.get('version', 1)}, this version reads form {VERSION})",
            hint="go on with it, report and export it with the version that made it; or start in a new output folder",
        )
