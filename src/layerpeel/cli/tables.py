"""The tables that the commands print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from layerpeel.model.family_table import family_statuses
from layerpeel.processes.progress import shown
from layerpeel.processes.text import count, duration, moment, one_line, percent, size

if TYPE_CHECKING:
    from layerpeel.importance.scores import LayerScores
    from layerpeel.plan.planning import Plan
    from layerpeel.plan.starting import Started
    from layerpeel.report import tables
    from layerpeel.report.listing import RunStatus
    from layerpeel.run.events import Quality
    from layerpeel.run.folder import Run
    from layerpeel.tasks.scores import Evaluation
    from layerpeel.training.result import RepairResult


def run_table(run: Run) -> Table:
    """The teacher and the student of each round, and of a training after the last one: size and scores."""
    teacher = run.teacher
    assert teacher
    tasks = list(teacher.evaluation.scores)
    heads = ["round", "removed", "layers", "params", "aggregate", "% of\nteacher"]
    table = Table(*heads, *(shown(task).replace("_", "\n") for task in tasks), box=None, header_style="bold")

    def add(number: str, removed: str, layers: int, quality: Quality) -> None:
        scores = [_number(quality.evaluation.scores[task].value) for task in tasks]
        shares = [f"{quality.aggregate:.3f}", f"{100 * quality.kept_quality:.1f}"]
        table.add_row(number, removed, str(layers), f"{quality.parameters / 1e6:.2f} M", *shares, *scores)

    add("-", "-", teacher.layers, teacher)
    for each in run.rounds:
        add(str(each.number), str(each.removed), each.layers, each.end)
    if run.finish and run.finish.last_pass:
        add("last pass", "-", run.finish.layers, run.finish.last_pass)
    return table


def repair_table(result: RepairResult) -> Table:
    """What a repair did to each projection."""
    heads = ["layer", "projection", "error before", "after", "ridge"]
    table = Table(*heads, box=None, header_style="bold")
    for each in result.projections:
        ridge = "as it was" if each.ridge is None else f"{each.ridge:g}"
        table.add_row(str(each.layer), shown(each.name), f"{each.before:.4f}", f"{each.after:.4f}", ridge)
    return table


def score_table(scores: LayerScores) -> Table:
    """The layers by importance, least important first, with a bar each."""
    columns = ["rank", "layer", f"{shown(scores.metric)}:\nlost when skipped", ""]
    table = Table(*columns[:3], *(["± stderr"] if scores.stderr else []), columns[3], box=None, header_style="bold")
    span = max(map(abs, scores.importance.values())) or 1.0
    for rank, layer in enumerate(scores.ranked(), start=1):
        value = scores.importance[layer]
        error = [f"{scores.stderr[layer]:.5f}"] if scores.stderr else []
        share = scores.dropped.get(layer)
        note = f" given up after {share:.0%} of the samples" if share else ""
        bar = "█" * round(40 * abs(value) / span)
        colour = "green" if value < 0 else "blue"
        table.add_row(str(rank), str(layer), f"{value:.5f}", *error, f"[{colour}]{bar}[/]{note}")
    if len(scores.tied()) > 1:
        table.caption = f"tied: layers {', '.join(map(str, scores.tied()))}; the lowest index goes first"
    return table


def plan_tables(plan: Plan) -> list[Table | str]:
    """What a plan says of memory and of work."""
    phases = plan.phases.values()
    memory = Table("memory of each device", *plan.phases, box=None, header_style="bold")
    for part in dict.fromkeys(part for phase in phases for part in phase):
        memory.add_row(part, *(size(phase[part]) if part in phase else "" for phase in phases))
    memory.add_row("in all", *(size(sum(phase.values())) for phase in phases), style="bold")
    work = Table("work", "tokens × layers", "time", box=None, header_style="bold")
    reads = any(plan.read.values())  # layers stay on the disk
    if reads:
        work.add_column("read from disk")
    for part, seconds in plan.seconds.items():
        work.add_row(part, count(plan.layer_tokens[part]), duration(seconds), *[size(plan.read[part])] * reads)
    tokens, seconds, read = (sum(each.values()) for each in (plan.layer_tokens, plan.seconds, plan.read))
    work.add_row("in all", count(tokens), duration(seconds), *[size(read)] * reads, style="bold")
    return [f"{plan.rounds} rounds, {count(plan.trained)} parameters in training", memory, "", work]


def listing_table(statuses: Sequence[RunStatus]) -> Table:
    """The runs below a folder."""
    table = Table("run", "state", "rounds", "layers", "% kept", "last activity", "", box=None, header_style="bold")
    for status in statuses:
        layers = f"{status.teacher_layers} → {status.layers}" if status.layers else "–"
        cells = [status.run, status.state, status.rounds, layers, percent(status.kept_quality)]
        cells += [moment(status.last_activity), one_line(status.note)]
        table.add_row(*(shown(cell) for cell in cells))
    return table


def families_table() -> Table:
    """The model families, tested or refused."""
    table = Table("family", "layers", "status", "files", "note", box=None, header_style="bold")
    for status in family_statuses():
        table.add_row(status.family, status.layers, status.status, status.files, status.note)
    return table


def report_table(table: tables.Table) -> Table:
    """A table of a report or a study, for the terminal."""
    printed = Table(*map(shown, table.heads), box=None, header_style="bold", title=table.caption, title_justify="left")
    for row in table.rows:
        printed.add_row(*(shown(cell.text) for cell in row))
    return printed


def evaluation_table(evaluation: Evaluation) -> Table:
    """The score of each task."""
    table = Table("task", "score", "stderr", "n", box=None, header_style="bold")
    for name, score in evaluation.scores.items():
        table.add_row(shown(name), _number(score.value), _number(score.stderr), str(score.n))
    return table


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def start_lines(started: Started) -> list[Table | str]:
    """What a first config chose, what it will take, and the next command."""
    choices, scoring = started.choices, started.choices.scoring
    config, *others = map(shown, started.files)
    ranking = {0: "once", 1: "before each removal"}.get(scoring.every, f"before each {scoring.every} removals")
    repair = f"repaired on {choices.repair_tokens:,} tokens after each, " if choices.repair_tokens else ""
    return [
        f"{choices.layers} layers to {choices.target_layers}"
        + (", which are read from disk as they run, to fit into memory" if choices.stream else ""),
        f"scored by {scoring.decide} {ranking}, on {scoring.tokens:,} tokens",
        f"measured on {', '.join(str(task['name']) for task in choices.tasks)}, {choices.limit} rows each",
        f"{repair}trained on {choices.rounds * choices.tokens_per_round:,} after the last, of "
        + (shown(choices.text) if choices.text else "text that the teacher writes"),
        *plan_tables(started.plan),
        f"config   {config}",
        *(f"held out {other}" for other in others),
        f"next     layerpeel run {config}",
    ]
