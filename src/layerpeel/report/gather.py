"""The rows of a report's tables, and the facts around them, from a run's record and files."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerpeel.config.run import RunConfig
from layerpeel.errors import InputError
from layerpeel.importance.scores import LayerScores
from layerpeel.model.checkpoint import stored_dtype
from layerpeel.report.rows import CostRow, DepthRow, ImportanceRow, QualityRow, RemovalRow
from layerpeel.run.events import Quality
from layerpeel.run.folder import Run
from layerpeel.run.record import Round
from layerpeel.storage.files import sha256_of
from layerpeel.storage.outputs import beside

REASONS = {
    "target_layers": "the target depth was reached",
    "max_params": "the target size was reached",
    "min_quality": "the next removal went below the quality floor",
    "no_candidates": "no layer was left that may go",
}

WHEN = {
    "each_round": "a round",
    "half": "a removal, half of them at the end",
    "end": "a removal, at the end",
}


def depth_rows(run: Run) -> list[DepthRow]:
    """A row for the teacher, one for each round, and one for the last pass of training, if there was one."""
    teacher = run.teacher
    if not teacher:
        return []
    reference, how, parameter_bytes = teacher.evaluation, run.config.aggregate, bytes_per_parameter(run)

    def row(quality: Quality, number: int, removed: int | None, layers: int, *, last_pass: bool = False) -> DepthRow:
        return DepthRow(
            round=number,
            removed=removed,
            last_pass=last_pass,
            layers=layers,
            parameters=quality.parameters,
            parameters_kept=quality.parameters / teacher.parameters,
            bytes=None if parameter_bytes is None else round(parameter_bytes * quality.parameters),
            aggregate=quality.aggregate,
            aggregate_stderr=quality.evaluation.aggregate_stderr(reference, how),
            kept_quality=quality.kept_quality,
            evaluation=quality.evaluation,
        )

    rows = [row(teacher, 0, None, teacher.layers)]
    rows += [row(each.end, each.number, each.removed, each.layers) for each in run.rounds]
    if run.last_pass:
        result = rows[run.result_round]
        rows.append(row(run.last_pass, result.round, result.removed, result.layers, last_pass=True))
    return rows


def result_row(rows: Sequence[DepthRow], run: Run) -> int:
    """Index of the row of the run's result, or of the last round while the run goes on."""
    return max(index for index, row in enumerate(rows) if row.round == run.result_round)


def bytes_per_parameter(run: Run) -> float | None:
    """By the result's files on disk; without them, by the dtype of the teacher's checkpoint, if it is a folder."""
    files = student_files(run)
    if files and run.finish and run.teacher:
        result = run.rounds[run.result_round - 1].end if run.result_round else run.teacher
        return sum(file.stat().st_size for file in files) / result.parameters
    if not Path(run.config.teacher).is_dir():
        return None
    try:
        return float(stored_dtype(run.config.teacher).itemsize)
    except InputError:
        return None


def student_files(run: Run) -> list[Path]:
    return sorted(run.student_folder.glob("*.safetensors"))


def quality_rows(runs: dict[str, Run]) -> list[QualityRow]:
    """Every depth of every run.

    Args:
        runs: by name.
    """
    return [
        QualityRow(
            run=name,
            removed=row.round,
            last_pass=row.last_pass,
            layers=row.layers,
            parameters=row.parameters,
            aggregate=row.aggregate,
            aggregate_stderr=row.aggregate_stderr,
            kept_quality=row.kept_quality,
        )
        for name, run in runs.items()
        for row in depth_rows(run)
    ]


def task_kept(run: Run) -> dict[str, list[float | None]]:
    """For each task, its quality at each depth as a share of the teacher's; None where the teacher's is 0."""
    if not run.teacher:
        return {}
    full = run.reference.qualities(run.reference)
    shares: dict[str, list[float | None]] = {task: [] for task in full}
    for evaluation in [run.reference, *(each.evaluation for each in run.rounds)]:
        for task, quality in evaluation.qualities(run.reference).items():
            shares[task].append(quality / full[task] if full[task] else None)
    return shares


def importance_rows(run: Run) -> list[ImportanceRow]:
    """Every score of every round, by the deciding metric and by the one that made the shortlist."""
    return [
        ImportanceRow(
            round=each.number,
            layer=layer,
            metric=scores.metric,
            role=role,
            importance=importance,
            stderr=scores.stderr.get(layer),
            after_healing=scores.healed.get(layer),
            removed=layer == each.removed,
        )
        for each in run.rounds
        for role, scores in _scorings(each)
        for layer, importance in sorted(scores.importance.items())
    ]


def _scorings(round_: Round) -> Iterator[tuple[str, LayerScores]]:
    yield "decides", round_.scores
    if round_.scores.cheap:
        yield "shortlist", round_.scores.cheap


def removal_rows(run: Run) -> list[RemovalRow]:
    """The removed layers, in order of removal."""
    rows = []
    for each in run.rounds:
        scores, layer = each.scores, each.removed
        rows.append(
            RemovalRow(
                round=each.number,
                removed=layer,
                metric=scores.metric,
                importance=scores.importance.get(layer),
                stderr=scores.stderr.get(layer),
                candidates=len((scores.cheap or scores).importance),
                scored=len(scores.importance),
                cheap_chooses_same=scores.cheap_chooses_same if scores.cheap else None,
            )
        )
    return rows


def cost_rows(run: Run) -> list[CostRow]:
    """What each round cost, and how much quality it lost."""
    if not run.teacher:
        return []
    rows, aggregate = [], run.teacher.aggregate
    for each in run.rounds:
        training, repair = each.training, each.repair
        rows.append(
            CostRow(
                round=each.number,
                removed=each.removed,
                scoring_seconds=sum(scores.seconds for _, scores in _scorings(each)),
                healing_seconds=each.scores.heal_seconds,
                repair_seconds=repair.seconds if repair else 0.0,
                error_before=repair.most.before if repair and repair.most else None,
                error_after=repair.most.after if repair and repair.most else None,
                training_seconds=training.seconds,
                training_tokens=training.tokens,
                first_loss=training.first_loss,
                last_loss=training.last_loss,
                aggregate_lost=aggregate - each.aggregate,
            )
        )
        aggregate = each.aggregate
    return rows


@dataclass(frozen=True)
class Costs:
    """What a run took.

    Attributes:
        text_seconds: of the text that the teacher wrote.
        scoring_seconds: short trainings of candidates included.
        layer_tokens: tokens that went through a layer in scoring.
        repair_seconds: of repairs in closed form.
        training_seconds: the last pass included.
        training_tokens: the last pass included.
    """

    text_seconds: float
    scoring_seconds: float
    layer_tokens: int
    repair_seconds: float
    training_seconds: float
    training_tokens: int

    @property
    def seconds(self) -> float:
        """Of all of these."""
        return self.text_seconds + self.scoring_seconds + self.repair_seconds + self.training_seconds


def costs_of(run: Run) -> Costs:
    """What the teacher's text, scoring, repair and training took in all."""
    rows = cost_rows(run)
    trainings = [each.training for each in run.rounds]
    if run.last_pass:
        trainings.append(run.last_pass.training)
    written = [text for text in run.teacher_texts if text.tokens_per_second]  # else it was there before
    return Costs(
        text_seconds=sum(text.tokens / text.tokens_per_second for text in written),
        scoring_seconds=sum(row.scoring_seconds + row.healing_seconds for row in rows),
        layer_tokens=sum(scores.layer_tokens for each in run.rounds for _, scores in _scorings(each)),
        repair_seconds=sum(row.repair_seconds for row in rows),
        training_seconds=sum(training.seconds for training in trainings),
        training_tokens=sum(training.tokens for training in trainings),
    )


def training_curves(run: Run) -> dict[int, list[dict[str, float]]]:
    """The training curve of each round; rounds without one, or whose file is gone or damaged, are left out."""
    curves = {each.number: run.curve(each) for each in run.rounds}
    return {number: curve for number, curve in curves.items() if curve}


def state_of(run: Run) -> tuple[str, str]:
    """`running`, `finished` or `interrupted`, and a note for people."""
    if run.finish:
        return "finished", REASONS.get(run.finish.reason, run.finish.reason)
    if run.is_running:
        return "running", f"round {len(run.rounds) + 1}"
    return "interrupted", "run the same command again to go on"


def method_of(config: RunConfig) -> str:
    """A short description of what a config does: metric, how often it ranks, repair, how much it trains."""
    tokens, every = config.distill.tokens_per_round, config.score.every
    ranked = {0: ", ranked once", 1: ""}.get(every, f", ranked every {every} rounds")
    trained = f", {tokens:,} tokens {WHEN[config.distill.when]}" if tokens else ", no training"
    repair = ", repair" if config.distill.repairs else ""
    return config.score.decide + ranked + repair + trained


def names_of(runs: Sequence[Run]) -> list[str]:
    """The shortest ends of the runs' paths that differ."""
    paths = [run.folder.absolute().parts for run in runs]
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def hashes(run: Run) -> dict[str, str]:
    """SHA-256 of each of the student's safetensors files, by file name."""
    return {path.name: str(sha256_of(path)) for path in student_files(run)}


def command_of(run: Run) -> str:
    """The shell command that repeats the run in another folder."""
    output = beside(run.folder, "-again")
    return shlex.join(["layerpeel", "run", str(run.folder / "config.yaml"), "--set", f"output={output}"])
