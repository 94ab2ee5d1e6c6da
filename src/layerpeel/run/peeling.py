"""A run in memory: its models, data and record, and the steps of the loop over them."""

from __future__ import annotations

from collections.abc import Sequence

from layerpeel.config.run import RunConfig
from layerpeel.data.rows import Rows
from layerpeel.data.token_store import TokenStore
from layerpeel.importance.base import ScoringInputs
from layerpeel.importance.scores import LayerScores, last_ranking
from layerpeel.importance.scoring import score_candidates, scoring_text, unremovable_teacher_layers
from layerpeel.inference.loading import load_layerwise
from layerpeel.model.origin import stored_dtypes, teacher_origin
from layerpeel.processes.progress import console
from layerpeel.run.card import write_card
from layerpeel.run.events import StudentRecord, TeacherRecord
from layerpeel.run.heal import heal_candidates
from layerpeel.run.health import dropped_last_pass, note, note_findings
from layerpeel.run.preflight import leaving_nothing, removable
from layerpeel.run.record import Round
from layerpeel.run.student_checks import check_size, check_trained
from layerpeel.run.writing import OpenRun
from layerpeel.tasks.base import Task
from layerpeel.tasks.evaluation import evaluate, refuse_generation
from layerpeel.tasks.scores import Evaluation
from layerpeel.training.repairing import repair_student
from layerpeel.training.result import RepairResult, TrainingResult
from layerpeel.training.rounds import train_last, train_student
from layerpeel.training.student import Student
from layerpeel.training.teacher_cache import TeacherCache, cache_for
from layerpeel.training.teacher_text import with_teacher_text
from layerpeel.training.text import tokenize_text
from layerpeel.training.writing import write_student


class Peeling:
    """What the loop works on, and its steps.

    Attributes:
        run: the record, which knows how far the run is.
        config: how to go on; once the teacher has written text, with the folders of that.
        tasks: what the models are evaluated on.
        tokenizer: the teacher's.
        student: the teacher without the layers that are gone, as trained so far.
        text: what metrics read; None if the config has no text, or the teacher has not written it yet.
        storage: the dtypes that the student's tensors will be saved in.
        cache: the teacher's hidden states on disk; None if they are computed each time.
        free: the teacher layers that may go next, as of the last `stop_reason`.
        result: the round whose student would be the result, as of the last `stop_reason`.
        texts: the token ids of all text that is read.
    """

    def __init__(self, run: OpenRun, config: RunConfig, tasks: Sequence[Task]) -> None:
        """Loads the teacher; takes the run's folder away again, if it is new and the model or the data will not do.

        Raises:
            InputError: they will not.
        """
        self.run, self.config, self.tasks = run, config, tasks
        self.cache: TeacherCache | None = None
        self.free: tuple[int, ...] = ()
        self.result = 0
        self.texts = TokenStore(run.text_folder)
        with leaving_nothing(run):
            pinned = config.model_copy(update={"revision": run.pinned_config.revision})
            teacher, self.tokenizer = load_layerwise(pinned, stream=config.streams)
            if teacher.streamed:
                refuse_generation(tasks, self.tokenizer)
            self.student = Student(teacher)
            check_trained(self.student, config.distill)
            check_size(self.student, config)
            self.storage = stored_dtypes(teacher_origin(pinned), teacher.model)
            self.text = None if config.has_teacher_text else self._read_text()

    def begin(self) -> None:
        """Evaluates the teacher, unless that was done, and brings the student to the end of the last round."""
        if not self.run.teacher:
            self.run.record_teacher(self.student, self.evaluate())
        self._write_text()
        self.run.restore(self.student)
        note_findings(self.run)
        self.cache = cache_for(self.config, self.student.teacher.model, self.run.folder)

    def _write_text(self) -> None:
        """Lets the teacher write the text that the config wants of it, as far as it is not there, and reads it."""
        if not self.config.has_teacher_text:
            return
        self.config, texts = with_teacher_text(
            self.config,
            self.student.teacher,
            self.tokenizer,
            self.run.text_folder,
            removals=self._removals,
            teacher_files=self.run.start.teacher_files if self.run.start else None,
        )
        for text in texts:
            self.run.record_teacher_text(text)
        self.text = self._read_text()

    def _read_text(self) -> Rows | None:
        """Tokenises what the run will read, as far as that is known and not done; gives what metrics read."""
        tokenize_text(self.config, self.tokenizer, self.texts, self._removals)
        text = scoring_text(self.config, self.tokenizer, self.texts)
        self.texts.remove_unused()
        return text

    @property
    def _removals(self) -> int:
        """How many layers will go, as far as the config says so: else one at least."""
        target = self.config.stop.target_layers
        return 1 if target is None else self.student.kept_layers.total - target

    def stop_reason(self) -> str | None:
        """Why the run is over: the name of the stop that holds, or `no_candidates`; None to go on."""
        student = self.student
        fixed = unremovable_teacher_layers(
            student.model, student.kept_layers, pattern=self.config.score.protect.pattern
        )
        self.free = removable(student.kept_layers, self.config, fixed)
        self.result, reason = self._reached()
        return reason or (None if self.free else "no_candidates")

    def _reached(self) -> tuple[int, str | None]:
        """The round that the stops lead to, and which of them holds, if one does.

        That is the last round, unless stops were raised after it: then earlier ones may be where the run would have
        ended.
        """
        stop, teacher, rounds = self.run.config.stop, self.run.teacher, self.run.rounds
        assert teacher
        stages: list[TeacherRecord | Round] = [teacher, *rounds]
        stops = (
            ("target_layers", stop.target_layers, [each.layers for each in stages]),
            ("max_params", stop.max_params, [each.parameters for each in stages]),
        )
        reached = (
            (number, name)
            for number in range(len(stages))
            for name, limit, sizes in stops
            if limit is not None and sizes[number] <= limit
        )
        result, reason = next(reached, (len(rounds), None))
        floor = stop.min_quality
        if not result or floor is None or rounds[result - 1].kept_quality >= floor:
            return result, reason
        return max((each.number for each in rounds[:result] if each.kept_quality >= floor), default=0), "min_quality"

    def score(self) -> int:
        """Scores the layers that may go, unless that was done in this round; gives the teacher layer that goes."""
        console.print(f"round {len(self.run.rounds) + 1}: {len(self.student.kept_layers)} layers")
        if not self.run.scored:
            inputs = self._scoring_inputs()
            scores = self._last_ranking() or score_candidates(inputs, self.student.kept_layers)
            if self.config.score.heal:
                heal_candidates(self.student, inputs, scores, self.config, self.texts)
            self.run.record_scores(scores)
        assert self.run.scored
        return self.run.scored.removed

    def remove(self, layer: int) -> None:
        """Removes a teacher layer from the student."""
        self.student.remove([layer])

    def repair(self, layer: int) -> RepairResult | None:
        """Repairs the student in closed form, from the layer before this one on; None if the config has no repair."""
        return repair_student(
            self.student,
            self.tokenizer,
            self.config.distill,
            [layer],
            seed=self.config.seed,
            storage=self.storage,
            state=self.run.repair_state(),
            texts=self.texts,
        )

    def train(self) -> TrainingResult:
        """Distils the student against the teacher, as `distill` says for each round."""
        return train_student(
            self.student,
            self.tokenizer,
            self.config.distill.in_rounds(),
            seed=self.config.seed,
            round_number=len(self.run.rounds) + 1,
            before=[each.training for each in self.run.rounds],
            storage=self.storage,
            cache=self.cache,
            state=self.run.training_state(),
            log=self.run.track,
            texts=self.texts,
        )

    def evaluate(self) -> Evaluation:
        """The student's scores on the tasks."""
        return evaluate(self.student.layerwise, self.tokenizer, self.tasks)

    def record(self, repair: RepairResult | None, training: TrainingResult, evaluation: Evaluation) -> None:
        """Records the round, and the signs of failure that it shows."""
        self.run.record_round(self.student, repair, training, evaluation)
        note_findings(self.run)

    def finish(self, reason: str) -> None:
        """Trains a last time, if the config says so, writes the checkpoint with its card, and records the end.

        Args:
            reason: from `stop_reason`.
        """
        if self.result < len(self.run.rounds):
            self.student = self.run.student_of(self.student.teacher, self.result)
            if reason != "min_quality":  # of which the command itself says whose student is the result
                console.print(
                    f"stop.{reason}: the student is that of round {self.result}; later rounds went beyond it",
                    soft_wrap=True,
                )
        last_pass = self._last_pass()
        write_student(self.student, self.tokenizer, self.run.pinned_config, self.run.student_folder)
        write_card(self.run, self.run.student_folder, len(self.student.kept_layers.removed), last_pass)
        self.run.record_finish(reason, self.student, last_pass)
        self.texts.clear()

    def _scoring_inputs(self) -> ScoringInputs:
        return ScoringInputs(
            self.student.layerwise,
            self.student.teacher,
            self.tokenizer,
            [self.student.kept_layers.position(layer) for layer in self.free],
            self.text,
            self.tasks,
            self.run.reference,
            self.config.aggregate,
            self.config.score,
            self.run.answers(),
        )

    def _last_ranking(self) -> LayerScores | None:
        rounds = self.run.rounds
        return last_ranking(rounds[-1].scores, len(rounds), self.config.score.every, self.free) if rounds else None

    def _last_pass(self) -> StudentRecord | None:
        """Trains after the last removal, and says what came of it.

        None if there is no such training, or if it took the student below the quality floor: then the student is again
        what it was before.
        """
        removed = len(self.student.kept_layers.removed)
        if not removed or not self.config.distill.at_end(removed):
            return None
        training = train_last(
            self.student,
            self.tokenizer,
            self.config,
            [each.training for each in self.run.rounds[:removed]],
            storage=self.storage,
            cache=self.cache,
            state=self.run.training_state(),
            log=self.run.track,
            texts=self.texts,
        )
        last_pass = self.run.student_record(self.student, None, training, self.evaluate())
        floor = self.run.config.stop.min_quality
        if floor is None or last_pass.kept_quality >= floor:
            return last_pass
        note(self.run, [dropped_last_pass(removed, last_pass.kept_quality)])
        self.student = self.run.student_of(self.student.teacher, removed)
        return None
