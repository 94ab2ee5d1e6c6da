"""Signs of failure, as checks on a run's record: those that the paper names (arXiv 2511.05085), and others' bugs.

Each check reads the record and yields what it finds; `note_findings` records what is new and prints it on stderr.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from layerpeel.processes.progress import console, shown
from layerpeel.processes.text import percent
from layerpeel.run.events import Finding, TeacherRecord
from layerpeel.run.record import Round, RunRecord
from layerpeel.run.text_health import degenerate_text
from layerpeel.run.writing import OpenRun

# The paper calls an aggregate under 0.3 after four removals a failure; its teacher scored 0.636.
FLOOR, FLOOR_SHARE, FLOOR_ROUND = 0.3, 0.3 / 0.636, 4
# Its rounds lose up to 3 % of the teacher's quality each; those that it calls sharp, 20 % and more.
SHARP_DROP = 0.1
LEAST_FALL, LEAST_STEPS = 0.02, 20  # of the loss, in a round of training: less is no recovery
WORTH_HEALING = 0.01  # where less than this share of the quality is gone, there is little to recover
COPY_COLLAPSE = 0.5  # of the share that the other tasks keep
SURE = 2.0  # standard errors


def note_findings(run: OpenRun) -> None:
    """Records what the checks find and the record does not hold yet, and prints it on stderr."""
    note(run, findings(run))


def note(run: OpenRun, new: Iterable[Finding]) -> None:
    """Records findings that the record does not hold yet, and prints them on stderr."""
    recorded = {_key(finding) for finding in run.findings}
    for finding in new:
        if _key(finding) not in recorded:
            run.record(finding)
            where = "teacher" if finding.round is None else f"round {finding.round}"
            colour = {"error": "red", "warning": "yellow", "note": "blue"}[finding.severity]
            console.print(f"[bold {colour}]{finding.severity}:[/] {where}: {shown(finding.message)}", soft_wrap=True)
            console.print(f"[bold]hint:[/] {shown(finding.hint)}", soft_wrap=True)


def findings(run: RunRecord) -> list[Finding]:
    """All that the checks find in a record, in the order of its rounds; the same each time, but for `time`."""
    if not run.teacher:
        return []
    checks = (
        at_zero,
        at_chance,
        under_floor,
        sharp_drop,
        not_finite,
        no_recovery,
        no_gradient,
        idle_loss,
        copy_collapse,
        degenerate_text,
    )
    return sorted((each for check in checks for each in check(run)), key=lambda each: each.round or 0)


def at_zero(run: RunRecord) -> Iterator[Finding]:
    """A teacher without any quality that a student could keep, on all tasks or on one."""
    assert run.teacher
    qualities = run.reference.qualities(run.reference)
    if run.teacher.aggregate and any(qualities.values()):
        for name, score in run.reference.scores.items():
            if not qualities[name] and score.chance is None:  # else `at_chance` says so
                yield Finding(
                    check="at_zero",
                    severity="warning",
                    round=None,
                    message=f"task {name}: the teacher scores 0 on all {score.n} rows, so the task cannot show what a "
                    "removal costs",
                    hint="check its prompt, its target and its metric, or leave it out",
                )
    else:
        yield Finding(
            check="at_zero",
            severity="error",
            round=None,
            message="the teacher scores 0 on all tasks: they show nothing that a student could keep, and its share of "
            "the teacher's quality says nothing",
            hint="check the prompts, the targets and the metric of the tasks, or take others",
        )


def at_chance(run: RunRecord) -> Iterator[Finding]:
    """Tasks on which the teacher is not surely better than guessing."""
    for name, score in run.reference.scores.items():
        if score.chance is None or not 0 < score.chance < 1:
            continue
        error = math.sqrt(score.chance * (1 - score.chance) / score.n)
        if score.value < score.chance + SURE * error:
            yield Finding(
                check="at_chance",
                severity="warning",
                round=None,
                message=f"task {name}: the teacher scores {score.value:.3f} on {score.n} rows, and guessing would "
                f"score {score.chance:.3f} ± {error:.3f}, so the task cannot show what a removal costs",
                hint="check its prompt and its answer column, give it more rows, or leave it out",
            )


def under_floor(run: RunRecord) -> Iterator[Finding]:
    """The first round, of the fourth and later ones, whose aggregate is that of a failed run."""
    assert run.teacher
    for each in run.rounds[FLOOR_ROUND - 1 :]:
        share, aggregate, teacher = each.kept_quality, each.aggregate, run.teacher.aggregate
        if share < FLOOR_SHARE or aggregate < FLOOR <= teacher:
            yield Finding(
                check="under_floor",
                severity="error" if share < FLOOR_SHARE else "warning",
                round=each.number,
                message=f"after {each.number} removals the aggregate is {aggregate:.3f}, {share:.0%} of the teacher's "
                f"{teacher:.3f}; under {FLOOR} or {FLOOR_SHARE:.0%}, removing costs more than training heals",
                hint="train more each round (distill.tokens_per_round), or stop earlier: set stop.min_quality, or "
                "export an earlier round",
            )
            return


def sharp_drop(run: RunRecord) -> Iterator[Finding]:
    """Rounds that lost much at once, beyond the noise of the tasks."""
    for before, each in _steps(run):
        lost = before.kept_quality - each.kept_quality
        noise = before.evaluation.difference_stderr(each.evaluation, run.reference, run.config.aggregate)
        if lost > SHARP_DROP and before.aggregate - each.aggregate > SURE * noise:
            decide = "" if run.config.score.decide == "task_quality" else "score.decide: task_quality, "
            yield Finding(
                check="sharp_drop",
                severity="warning",
                round=each.number,
                message=f"without layer {each.removed} the quality fell from {before.kept_quality:.1%} to "
                f"{each.kept_quality:.1%} of the teacher's in one round: the layer may be an essential one",
                hint=f"in a new output folder, keep it with score.protect.layers: [{each.removed}], or choose by a "
                f"better score ({decide}score.heal)",
            )


def not_finite(run: RunRecord) -> Iterator[Finding]:
    """Rounds with losses or scores that are no numbers."""
    for each in run.rounds:
        training = each.training
        if training.skipped:
            yield Finding(
                check="not_finite",
                severity="warning",
                round=each.number,
                message=f"{training.skipped} of the steps had a loss or a gradient that is not finite, and were skipped"
                + (
                    f"; training began again {training.restarts} times with half the learning rate"
                    if training.restarts
                    else ""
                ),
                hint="lower distill.learning_rate, or use dtype: float32; look at the scale of the logits",
            )
        if not math.isfinite(each.aggregate):
            yield Finding(
                check="not_finite",
                severity="error",
                round=each.number,
                message=f"the aggregate is {each.aggregate}: the student's scores are no numbers",
                hint="look for overflow (dtype: float32), and for NaN in the teacher's weights",
            )


def no_recovery(run: RunRecord) -> Iterator[Finding]:
    """Rounds whose training surely hardly lowered the loss, though quality was gone.

    Steps of few tokens are noisy, and after a repair there is less for a short training to recover than their noise.
    """
    for _, each in _steps(run):
        training = each.training
        first, last = training.first_loss, training.last_loss
        if first is None or last is None or training.steps < LEAST_STEPS:
            continue
        most = first - last + SURE * (training.fall_error or 0.0)
        if each.kept_quality < 1 - WORTH_HEALING and most < LEAST_FALL * first:
            yield Finding(
                check="no_recovery",
                severity="warning",
                round=each.number,
                message=f"training recovers nothing: in {training.steps} steps the loss went from {first:.4g} to "
                f"{last:.4g}, with {each.kept_quality:.1%} of the teacher's quality left",
                hint="raise distill.learning_rate or distill.tokens_per_round, or train more of it (distill.train: "
                "all); if that does not help, the student lacks capacity: stop a round earlier",
            )


def no_gradient(run: RunRecord) -> Iterator[Finding]:
    """Rounds that trained on a gradient of exactly zero."""
    for each in run.rounds:
        if each.training.steps and each.training.gradient_norm == 0:
            yield Finding(
                check="no_gradient",
                severity="error",
                round=each.number,
                message=f"the gradient was exactly zero in all {each.training.steps} steps: nothing was trained",
                hint="check the losses and their weights (distill.losses), and what trains (distill.train)",
            )


def idle_loss(run: RunRecord) -> Iterator[Finding]:
    """Losses that take no part in training: without gradient, or zero throughout."""
    for each in run.rounds:
        idle = dict.fromkeys(each.training.without_gradient, "does not depend on what trains")
        for name, ends in each.training.losses.items():
            if ends == (0, 0):
                idle.setdefault(name, "is zero from the first step to the last")
        for name, reason in idle.items():
            yield Finding(
                check="idle_loss",
                severity="warning",
                round=each.number,
                message=f"loss {name} {reason}, so it teaches nothing",
                hint="mend it or leave it out (distill.losses); or train what it sees (distill.train)",
            )


def copy_collapse(run: RunRecord) -> Iterator[Finding]:
    """The first round in which a copying task is far below the others; copying is the skill that goes first."""
    copies = {task.name for task in run.config.tasks if (task.model_extra or {}).get("metric") == "copy"}
    teacher = run.reference.qualities(run.reference)
    for name in sorted(copies):
        for each in run.rounds:
            qualities = each.evaluation.qualities(run.reference)
            kept = {task: quality / teacher[task] for task, quality in qualities.items() if teacher[task]}
            others = [share for task, share in kept.items() if task not in copies]
            if name not in kept or not others:
                break
            score = each.evaluation.scores[name]
            mean, lost = sum(others) / len(others), teacher[name] - score.value
            if kept[name] < COPY_COLLAPSE * mean and lost > SURE * score.stderr:
                yield Finding(
                    check="copy_collapse",
                    severity="warning",
                    round=each.number,
                    message=f"task {name}: {kept[name]:.0%} of the teacher's copying is left, where the other tasks "
                    f"keep {mean:.0%}",
                    hint="train on text that holds copies, or on what the teacher writes beside yours "
                    "(distill.text: {from: teacher}), on more of it (distill.tokens_per_round), or export an earlier "
                    "round",
                )
                break


def dropped_last_pass(round_number: int, kept_quality: float) -> Finding:
    """That the training at the end took a round's student below the quality floor, so that it is not the result."""
    return Finding(
        check="dropped_last_pass",
        severity="warning",
        round=round_number,
        message=f"the last pass went below the quality floor ({percent(kept_quality)} % of the teacher's); the "
        f"student is that of round {round_number}, as it was before",
        hint="lower its learning rate (distill.learning_rate, or that of distill.last_pass), or train on other text",
    )


def _steps(run: RunRecord) -> Iterator[tuple[TeacherRecord | Round, Round]]:
    """Each round, with what it began from: the teacher, or the round before."""
    assert run.teacher
    yield from zip([run.teacher, *run.rounds], run.rounds, strict=False)


def _key(finding: Finding) -> tuple[str, int | None, str]:
    return finding.check, finding.round, finding.message
