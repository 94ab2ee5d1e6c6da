"""The folder of a run, opened to write: its events and the files of its rounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from layerpeel.importance.scores import LayerScores
from layerpeel.inference.answer_cache import AnswerCache
from layerpeel.inference.teacher_text import WrittenText
from layerpeel.model.architecture import count_parameters
from layerpeel.model.forward_switches import attention_of
from layerpeel.model.new_tensors import NewTensor, write_file
from layerpeel.model.tensor_files import tensors_in
from layerpeel.processes.distributed import RANK, wait_for_all
from layerpeel.run.events import (
    AnyEvent,
    Finish,
    Quality,
    RoundEnd,
    Scored,
    StudentRecord,
    TeacherRecord,
    TeacherText,
    event_from_json,
    event_to_json,
)
from layerpeel.run.folder import SCORES, TRAINING, WEIGHTS, Run
from layerpeel.run.results_json import scores_to_json, training_to_json
from layerpeel.run.tracking import Tracker
from layerpeel.storage.files import hash_files, remove_paths, write_folder, write_json
from layerpeel.storage.hash_chain import append, checksum, to_line
from layerpeel.tasks.scores import Evaluation
from layerpeel.training.repair_states import RepairState
from layerpeel.training.result import RepairResult, TrainingResult
from layerpeel.training.state import TrainingState
from layerpeel.training.student import Student


class OpenRun(Run):
    """A run that this process works on, with others of the same launcher; `run.opening.open_run` gives it.

    All processes hold the same events; the main one writes them.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self._first_step = sum(each.training.steps + 1 for each in self.rounds)

    def record(self, event: AnyEvent) -> None:
        """Appends an event, and returns once it is on the disk; `events` then holds it as it will be read."""
        line = event_to_json(event)
        line["checksum"] = checksum(line, self.events[-1].checksum if self.events else "")
        append(self.journal, to_line(line))
        self.events.append(event_from_json(line, str(self.journal)))

    def record_teacher(self, student: Student, evaluation: Evaluation) -> None:
        """Appends the teacher's event, from a student that nothing has been removed from."""
        quality = self._quality(student, evaluation, evaluation)
        attention = attention_of(student.teacher.model.config)
        self.record(TeacherRecord(layers=len(student.kept_layers), attention=attention, **dict(quality)))

    def record_teacher_text(self, written: WrittenText) -> None:
        """Appends the event of a text that the teacher wrote, unless that is on record."""
        folder = written.folder.relative_to(self.folder).as_posix()
        if folder not in [each.folder for each in self.teacher_texts]:
            self.record(
                TeacherText(
                    folder=folder,
                    documents=written.text.documents,
                    tokens=written.text.tokens,
                    tokens_per_second=round(written.tokens_per_second, 1),
                    samples=written.samples(),
                    **asdict(written.signs()),
                )
            )

    def record_scores(self, scores: LayerScores) -> None:
        """Appends the running round's scores, and with them the choice of the layer to remove."""
        self.record(Scored(round=len(self.rounds) + 1, removed=scores.ranked()[0], scores=scores))

    def record_round(
        self, student: Student, repair: RepairResult | None, training: TrainingResult, evaluation: Evaluation
    ) -> None:
        """Writes a round's files, then its event; a round without its event never happened."""
        number = len(self.rounds) + 1
        write_folder(self.round_folder(number), lambda folder: self._write_round(folder, student, training))
        files = hash_files(self.round_folder(number), self.folder)
        if student.teacher.streamed:
            wait_for_all()  # the main process has written it
            student.keep_on_disk(tensors_in(self.round_folder(number) / WEIGHTS))
        result = self.student_record(student, repair, training, evaluation)
        self.record(RoundEnd(round=number, kept=student.kept_layers.kept, files=files, **dict(result)))
        self._clear()
        self.track(
            {
                "layers": len(student.kept_layers),
                "aggregate": result.aggregate,
                "kept_quality": result.kept_quality,
            }
        )

    def record_finish(self, reason: str, student: Student, last_pass: StudentRecord | None) -> None:
        """Appends the last event, with the hashes of the checkpoint; its model card may be edited by hand."""
        self.record(
            Finish(
                reason=reason,
                round=len(student.kept_layers.removed),
                layers=len(student.kept_layers),
                last_pass=last_pass,
                files=hash_files(self.student_folder, self.folder, but=("README.md",)),
            )
        )
        self._clear()

    def student_record(
        self, student: Student, repair: RepairResult | None, training: TrainingResult, evaluation: Evaluation
    ) -> StudentRecord:
        """A student's size, how it was repaired and trained, and its quality beside the teacher's."""
        quality = self._quality(student, evaluation, self.reference)
        return StudentRecord(repair=repair, training=training.summary(), **dict(quality))

    def track(self, values: Mapping[str, float]) -> None:
        """Sends numbers to the trackers that the config names."""
        self._tracker.log(values)

    def answers(self) -> AnswerCache:
        """What tasks were answered in the running round, kept until it is recorded; each process has a file."""
        return AnswerCache(self._answers_folder / f"{RANK}.jsonl", f"round {len(self.rounds) + 1}")

    def training_state(self) -> TrainingState:
        """Where the running training saves how far it is: that of a removal, or the one after the last."""
        path = self.folder / "rounds" / ".training"
        return TrainingState(path, self._before_training, self.config.distill.save_every)

    def repair_state(self) -> RepairState:
        """Where the running round keeps the projections that its repair has solved."""
        return RepairState(self.folder / "rounds" / ".repair", self._before_training)

    @property
    def _before_training(self) -> str:
        """What is on record before the student changes; of the text, the states say it themselves."""
        return next((event.checksum for event in reversed(self.live) if hasattr(event, "round")), "")

    def _write_round(self, folder: Path, student: Student, training: TrainingResult) -> None:
        """Writes what an event has no room for."""
        assert self.scored
        write_json(folder / SCORES, scores_to_json(self.scored.scores))
        write_json(folder / TRAINING, training_to_json(training))
        replaced = {name: NewTensor.copied(name, stored) for name, stored in student.replaced.items()}
        trained = {name: NewTensor.of(name, value) for name, value in student.trained_state().items()}
        write_file(folder / WEIGHTS, (replaced | trained).values())

    def _clear(self) -> None:
        """Removes what only the round that was running needed."""
        remove_paths(self._answers_folder)
        self.training_state().clear()
        self.repair_state().clear()
        wait_for_all()  # before another process makes its files of the next round

    def _quality(self, student: Student, evaluation: Evaluation, reference: Evaluation) -> Quality:
        aggregate = evaluation.aggregate(reference, self.config.aggregate)
        teacher = reference.aggregate(reference, self.config.aggregate)
        return Quality(
            parameters=count_parameters(student.model),
            evaluation=evaluation,
            aggregate=aggregate,
            kept_quality=aggregate / teacher if teacher else 0.0,  # nothing that could be kept
        )

    @property
    def _answers_folder(self) -> Path:
        return self.folder / "rounds" / ".answers"

    @cached_property
    def _tracker(self) -> Tracker:
        return Tracker(self.config, self.folder, self._first_step)
