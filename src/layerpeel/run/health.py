"""Signs of failure, as checks on a run's journal: those that the paper names (arXiv 2511.05085), and others' bugs.

Each check reads the journal and gives what it finds; `note_findings` records what is new and says it on stderr.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from layerpeel.processes.progress import console, shown
from layerpeel.run.folder import Run
from layerpeel.tasks.scores import Evaluation

# The paper calls an aggregate under 0.3 after four removals a failure; its teacher scored 0.636.
FLOOR, FLOOR_SHARE, FLOOR_ROUND = 0.3, 0.3 / 0.636, 4
# Its rounds lose up to 3 % of the teacher's quality each; those that it calls sharp, 20 % and more.
SHARP_DROP = 0.1
LEAST_FALL, LEAST_STEPS = 0.02, 20  # of the loss, in a round of training: less is no recovery
WORTH_HEALING = 0.01  # where less than this share of the quality is gone, there is little to recover
COPY_COLLAPSE = 0.5  # of the share that the other tasks keep
SURE = 2.0  # standard errors


@dataclass(frozen=True)
class Finding:
    """What a check found: in which round (None: of the teacher), and what to do."""

    check: str
    severity: Literal["error", "warning", "note"]
    round: int | None
    message: str
    hint: str


def note_findings(run: Run) -> None:
    """Records what the checks find and the journal does not hold yet, and says it."""
    known = {_key(event) for event in run.events if event["event"] == "finding"}
    for found in findings(run):
        fields = asdict(found)
        if _key(fields) not in known:
            run.record("finding", **fields)
            where = "teacher" if found.round is None else f"round {found.round}"
            colour = {"error": "red", "warning": "yellow", "note": "blue"}[found.severity]
            console.print(f"[bold {colour}]{found.severity}:[/] {where}: {shown(found.message)}", soft_wrap=True)
            console.print(f"[bold]hint:[/] {shown(found.hint)}", soft_wrap=True)


def findings(run: Run) -> list[Finding]:
    """All that the checks find in a journal, in the order of its rounds; the same each time."""
    if not run.teacher:
        return []
    checks = (at_chance, under_floor, sharp_drop, not_finite, no_recovery, no_gradient, idle_loss, copy_collapse)
    found = [each for check in checks for each in check(run)]
    return sorted(found, key=lambda each: each.round or 0)


def at_chance(run: Run) -> Iterator[Finding]:
    """Tasks on which the teacher is not surely better than guessing."""
    for name, score in run.reference.scores.items():
        if score.chance is None or not 0 < score.chance < 1:
            continue
        error = math.sqrt(score.chance * (1 - score.chance) / score.n)
        if score.value < score.chance + SURE * error:
            yield Finding(
                "at_chance",
                "warning",
                None,
                f"task {name}: the teacher scores {score.value:.3f} on {score.n} rows, and guessing would score "
                f"{score.chance:.3f} ± {error:.3f}, so the task cannot show what a removal costs",
                "check its prompt and its answer column, give it more rows, or leave it out",
            )


def under_floor(run: Run) -> Iterator[Finding]:
    """The first round, of the fourth and later ones, whose aggregate is that of a failed run."""
    assert run.teacher
    for event in run.rounds[FLOOR_ROUND - 1 :]:
        share, own, whole = event["kept_quality"], event["aggregate"], run.teacher["aggregate"]
        if share < FLOOR_SHARE or own < FLOOR <= whole:
            yield Finding(
                "under_floor",
                "error" if share < FLOOR_SHARE else "warning",
                event["round"],
                f"after {event['round']} removals the aggregate is {own:.3f}, {share:.0%} of the teacher's "
                f"{whole:.3f}; under {FLOOR} or {FLOOR_SHARE:.0%}, removing costs more than training heals",
                "train more each round (distill.tokens_per_round), or stop earlier: set stop.min_quality, or export "
                "an earlier round",
            )
            return


def sharp_drop(run: Run) -> Iterator[Finding]:
    """Rounds that lost much at once, beyond the noise of the tasks."""
    for before, event in _steps(run):
        lost = before["kept_quality"] - event["kept_quality"]
        then, now = (Evaluation.from_json(each["evaluation"]) for each in (before, event))
        noise = then.difference_stderr(now, run.reference, run.config.aggregate)
        if lost > SHARP_DROP and before["aggregate"] - event["aggregate"] > SURE * noise:
            decide = "" if run.config.score.decide == "task_quality" else "score.decide: task_quality, "
            yield Finding(
                "sharp_drop",
                "warning",
                event["round"],
                f"without layer {event['removed']} the quality fell from {before['kept_quality']:.1%} to "
                f"{event['kept_quality']:.1%} of the teacher's in one round: the layer may be an essential one",
                f"in a new output folder, keep it with score.protect.layers: [{event['removed']}], or choose by a "
                f"better score ({decide}score.heal)",
            )


def not_finite(run: Run) -> Iterator[Finding]:
    """Rounds with losses or scores that are no numbers."""
    for event in run.rounds:
        training = event["training"]
        skipped, restarts = training.get("skipped", 0), training.get("restarts", 0)
        if skipped:
            yield Finding(
                "not_finite",
                "warning",
                event["round"],
                f"{skipped} of the steps had a loss or a gradient that is not finite, and were skipped"
                + (f"; training began again {restarts} times with half the learning rate" if restarts else ""),
                "lower distill.learning_rate, or use dtype: float32; look at the scale of the logits",
            )
        if not math.isfinite(event["aggregate"]):
            yield Finding(
                "not_finite",
                "error",
                event["round"],
                f"the aggregate is {event['aggregate']}: the student's scores are no numbers",
                "look for overflow (dtype: float32), and for NaN in the teacher's weights",
            )


def no_recovery(run: Run) -> Iterator[Finding]:
    """Rounds whose training hardly lowered the loss, though quality was gone."""
    for _, event in _steps(run):
        training = event["training"]
        first, last = training.get("first_loss"), training.get("last_loss")
        if first is None or last is None or training["steps"] < LEAST_STEPS:
            continue
        if event["kept_quality"] < 1 - WORTH_HEALING and last > (1 - LEAST_FALL) * first:
            yield Finding(
                "no_recovery",
                "warning",
                event["round"],
                f"training recovers nothing: in {training['steps']} steps the loss went from {first:.4g} to "
                f"{last:.4g}, with {event['kept_quality']:.1%} of the teacher's quality left",
                "raise distill.learning_rate or distill.tokens_per_round, or train more of it (distill.train: all); if "
                "that does not help, the student lacks capacity: stop a round earlier",
            )


def no_gradient(run: Run) -> Iterator[Finding]:
    """Rounds that trained on a gradient of exactly zero."""
    for event in run.rounds:
        if event["training"]["steps"] and event["training"].get("gradient_norm") == 0:
            yield Finding(
                "no_gradient",
                "error",
                event["round"],
                f"the gradient was exactly zero in all {event['training']['steps']} steps: nothing was trained",
                "check the losses and their weights (distill.losses), and what trains (distill.train)",
            )


def idle_loss(run: Run) -> Iterator[Finding]:
    """Losses that take no part in training: without gradient, or zero throughout."""
    for event in run.rounds:
        idle = dict.fromkeys(event["training"].get("without_gradient", []), "does not depend on what trains")
        for name, ends in event["training"].get("losses", {}).items():
            if ends == [0, 0]:
                idle.setdefault(name, "is zero from the first step to the last")
        for name, reason in idle.items():
            yield Finding(
                "idle_loss",
                "warning",
                event["round"],
                f"loss {name} {reason}, so it teaches nothing",
                "mend it or leave it out (distill.losses); or train what it sees (distill.train)",
            )


def copy_collapse(run: Run) -> Iterator[Finding]:
    """The first round in which a copying task is far below the others; copying is the skill that goes first."""
    copies = {task.name for task in run.config.tasks if (task.model_extra or {}).get("metric") == "copy"}
    whole = run.reference.qualities(run.reference)
    for name in sorted(copies):
        for event in run.rounds:
            now = Evaluation.from_json(event["evaluation"])
            kept = {each: value / whole[each] for each, value in now.qualities(run.reference).items() if whole[each]}
            others = [share for each, share in kept.items() if each not in copies]
            if name not in kept or not others:
                break
            mean, lost = sum(others) / len(others), whole[name] - now.scores[name].value
            if kept[name] < COPY_COLLAPSE * mean and lost > SURE * now.scores[name].stderr:
                yield Finding(
                    "copy_collapse",
                    "warning",
                    event["round"],
                    f"task {name}: {kept[name]:.0%} of the teacher's copying is left, where the other tasks keep "
                    f"{mean:.0%}",
                    "train on more, and on text with longer documents and repetition (distill.text, "
                    "distill.tokens_per_round), or export an earlier round",
                )
                break


def _steps(run: Run) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each round's event, with the one of what it began from."""
    assert run.teacher
    yield from zip([run.teacher, *run.rounds], run.rounds, strict=False)


def _key(finding: dict[str, Any]) -> tuple[Any, ...]:
    return finding["check"], finding["round"], finding["message"]
