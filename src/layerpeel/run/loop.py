"""The loop of the paper (arXiv 2511.05085): score, remove, distil, evaluate, record, until a stop holds."""

from __future__ import annotations

from collections.abc import Sequence

from layerpeel.config.run import RunConfig
from layerpeel.importance.base import ScoringInputs
from layerpeel.importance.scores import last_ranking
from layerpeel.importance.scoring import score_candidates, scoring_text, unremovable_teacher_layers
from layerpeel.model.architecture import count_parameters
from layerpeel.model.checkpoint import stored_dtype
from layerpeel.model.loading import load_teacher
from layerpeel.model.saving import save_model
from layerpeel.processes.progress import console
from layerpeel.run.card import write_card
from layerpeel.run.folder import Run
from layerpeel.run.heal import heal_candidates
from layerpeel.run.health import note_findings
from layerpeel.run.preflight import check_run, check_trained, leaving_nothing, removable
from layerpeel.tasks.base import Task
from layerpeel.tasks.evaluation import evaluate
from layerpeel.training.rounds import train_last, train_student
from layerpeel.training.student import Student
from layerpeel.training.teacher_cache import cache_for


def peel(config: RunConfig, *, accept_changes: bool = False) -> Run:
    """Makes the teacher shallower until a stop of the config holds; goes on with a run that was interrupted.

    Args:
        accept_changes: goes on with a run of another config where its rounds still hold (see `journal.FIXED`).

    Raises:
        InputError: the config, the model or the data will not do; found before any long work.
        RunError: training diverged, the disk is full, or the run's files are damaged.
        Interrupted: SIGINT or SIGTERM came, and all that was done is saved (where this is the main thread).
    """
    tasks = check_run(config)
    with Run.open(config, accept_changes=accept_changes) as run:
        if not run.finish:
            _go_on(run, config, tasks)
    return run


def _go_on(run: Run, config: RunConfig, tasks: Sequence[Task]) -> None:
    with leaving_nothing(run):
        teacher, tokenizer = load_teacher(config)
        student = Student(teacher)
        check_trained(student, config.distill)
        storage, text = stored_dtype(config.teacher), scoring_text(config, tokenizer)
    if not run.teacher:
        run.record_teacher(student, evaluate(teacher, tokenizer, tasks))
    run.restore(student)
    note_findings(run)
    cache = cache_for(config, teacher, run.folder)

    while not (reason := stop_reason(run, student, free := _free_layers(student, config))):
        number = len(run.rounds) + 1
        console.print(f"round {number}: {len(student.kept_layers)} layers")
        if not run.scored:
            candidates = [student.kept_layers.position(layer) for layer in free]
            inputs = ScoringInputs(
                student.layerwise,
                student.teacher,
                tokenizer,
                candidates,
                text,
                tasks,
                run.reference,
                config.aggregate,
                config.score,
                run.answers(),
            )
            scores = last_ranking(run.rounds, config.score.every, free) or score_candidates(inputs, student.kept_layers)
            if config.score.heal:
                heal_candidates(student, inputs, scores, config)
            run.record_scores(scores)
        assert run.scored
        student.remove([run.scored["removed"]])
        training = train_student(
            student,
            tokenizer,
            config.distill.in_rounds(),
            seed=config.seed,
            round_number=number,
            storage=storage,
            cache=cache,
            state=run.training_state(),
            log=run.track,
        )
        run.record_round(student, training, evaluate(student.model, tokenizer, tasks))
        note_findings(run)

    if reason == "min_quality":  # the last student above the floor is the result
        student = Student(teacher)
        run.restore(student, len(run.rounds) - 1)
    last = None
    if config.distill.at_end(len(student.kept_layers.removed)):
        training = train_last(
            student, tokenizer, config, storage=storage, cache=cache, state=run.training_state(), log=run.track
        )
        last = run.evaluated(student, training, evaluate(student.model, tokenizer, tasks))
    save_model(student.model, tokenizer, run.student_folder, storage)
    write_card(run, run.student_folder, len(student.kept_layers.removed), last)
    run.record_finish(reason, student, last)


def stop_reason(run: Run, student: Student, free: Sequence[int]) -> str | None:
    """Why the run is over: the name of the stop that holds, or `no_candidates`; None to go on.

    Args:
        free: the teacher layers that may go next.
    """
    stop = run.config.stop
    if run.rounds and stop.min_quality is not None and run.rounds[-1]["kept_quality"] < stop.min_quality:
        return "min_quality"
    if stop.target_layers is not None and len(student.kept_layers) <= stop.target_layers:
        return "target_layers"
    if stop.max_params is not None and count_parameters(student.model) <= stop.max_params:
        return "max_params"
    return None if free else "no_candidates"


def _free_layers(student: Student, config: RunConfig) -> tuple[int, ...]:
    return removable(student.kept_layers, config, unremovable_teacher_layers(student.model, student.kept_layers))
