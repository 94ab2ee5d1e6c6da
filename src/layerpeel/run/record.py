"""What the events of a run say, once those that a later event has undone are left out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from layerpeel.config.run import RunConfig
from layerpeel.errors import InputError
from layerpeel.importance.scores import LayerScores
from layerpeel.run.events import (
    AnyEvent,
    Back,
    Changed,
    DataDigests,
    Event,
    Finding,
    Finish,
    Moved,
    RoundEnd,
    Scored,
    Start,
    StudentRecord,
    TeacherRecord,
    TeacherText,
)
from layerpeel.tasks.scores import Evaluation
from layerpeel.training.result import RepairResult, TrainingSummary

E = TypeVar("E", bound=Event)


@dataclass(frozen=True)
class Round:
    """A finished round: what was scored and removed, and what came of it."""

    scored: Scored
    end: RoundEnd

    @property
    def number(self) -> int:
        """Counted from 1."""
        return self.end.round

    @property
    def removed(self) -> int:
        """The teacher layer that went."""
        return self.scored.removed

    @property
    def scores(self) -> LayerScores:
        return self.scored.scores

    @property
    def kept(self) -> tuple[int, ...]:
        """Teacher layers that the student still has, ascending."""
        return self.end.kept

    @property
    def layers(self) -> int:
        """How many the student still has."""
        return len(self.end.kept)

    @property
    def parameters(self) -> int:
        return self.end.parameters

    @property
    def repair(self) -> RepairResult | None:
        return self.end.repair

    @property
    def training(self) -> TrainingSummary:
        return self.end.training

    @property
    def evaluation(self) -> Evaluation:
        return self.end.evaluation

    @property
    def aggregate(self) -> float:
        return self.end.aggregate

    @property
    def kept_quality(self) -> float:
        """The student's aggregate as a share of the teacher's."""
        return self.end.kept_quality

    @property
    def files(self) -> dict[str, str]:
        return self.end.files


class RunRecord:
    """What the events of a run say; those that a later one has undone are left out.

    Attributes:
        events: all, oldest first.
        name: what error messages call the run.
    """

    def __init__(self, events: Iterable[AnyEvent], name: str = "record") -> None:
        self.name = name
        self.events: list[AnyEvent] = list(events)

    @property
    def live(self) -> list[AnyEvent]:
        """The events that hold: all but those that a later one has undone."""
        live: list[AnyEvent] = []
        for event in self.events:
            if isinstance(event, Changed | Back):
                live = [each for each in live if _round_of(each) <= event.to and not isinstance(each, Finish)]
            live.append(event)
        return live

    @property
    def start(self) -> Start | None:
        return self._last(Start)

    @property
    def config(self) -> RunConfig:
        """The config that holds now.

        Raises:
            InputError: the run has not begun.
        """
        return self._settings.config

    @property
    def recorded_folder(self) -> str:
        """Where the run's folder was when its config was recorded; empty if that was not."""
        return self._settings.folder

    @property
    def data(self) -> DataDigests:
        """What its data are."""
        return next(event.data for event in reversed(self.events) if isinstance(event, Start | Changed))

    @property
    def pinned_config(self) -> RunConfig:
        """The config that holds now, with the commit of the teacher that was read, if it is on the hub."""
        commit = self.start.teacher_files.get("commit") if self.start else None
        return self.config.model_copy(update={"revision": commit}) if commit else self.config

    @property
    def teacher(self) -> TeacherRecord | None:
        """What was measured of the teacher, once it was."""
        return self._last(TeacherRecord)

    @property
    def reference(self) -> Evaluation:
        """The teacher's scores on the tasks."""
        assert self.teacher
        return self.teacher.evaluation

    @property
    def teacher_texts(self) -> list[TeacherText]:
        """The texts that the teacher has written, each as it was written last."""
        return list({event.folder: event for event in self.live if isinstance(event, TeacherText)}.values())

    @property
    def rounds(self) -> list[Round]:
        """The finished rounds, in order."""
        live = self.live
        scored = {event.round: event for event in live if isinstance(event, Scored)}
        return [Round(scored[event.round], event) for event in live if isinstance(event, RoundEnd)]

    @property
    def scored(self) -> Scored | None:
        """The running round's scores and the layer that they chose, if it has come so far."""
        event = self._last(Scored)
        return event if event and event.round > len(self.rounds) else None

    @property
    def finish(self) -> Finish | None:
        return self._last(Finish)

    @property
    def findings(self) -> list[Finding]:
        return [event for event in self.events if isinstance(event, Finding)]

    @property
    def result_round(self) -> int:
        """The round whose student is the result; the last one while the run goes on."""
        return self.finish.round if self.finish else len(self.rounds)

    @property
    def last_pass(self) -> StudentRecord | None:
        """The result after the training that followed the last removal, if there was one."""
        return self.finish.last_pass if self.finish else None

    def removed_layers(self, number: int) -> list[int]:
        """The teacher layers that were gone after a round, ascending."""
        return sorted(each.removed for each in self.rounds[:number])

    @property
    def _settings(self) -> Start | Changed | Moved:
        event = next((event for event in reversed(self.events) if isinstance(event, Start | Changed | Moved)), None)
        if event is None:
            raise InputError(f"{self.name}: the run has not begun", hint="run it again: `layerpeel run`")
        return event

    def _last(self, kind: type[E]) -> E | None:
        return next((event for event in reversed(self.live) if isinstance(event, kind)), None)


def _round_of(event: AnyEvent) -> int:
    """The round that an event is of; 0 if it is of none."""
    return getattr(event, "round", None) or 0
