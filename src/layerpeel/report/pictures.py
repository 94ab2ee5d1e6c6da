"""The figures of a report, each with its title, its note and the table of its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure

from layerpeel.processes.text import one_line
from layerpeel.report import figures, gather, style, tables
from layerpeel.report.rows import DepthRow
from layerpeel.report.runtimes import VerifiedRow
from layerpeel.report.tables import Table
from layerpeel.run.folder import Run


@dataclass(frozen=True)
class Picture:
    """A figure of a page.

    Attributes:
        name: of its files, without suffix, and of its element in the page.
        title, note: what it shows.
        svg: the drawing, to be put into the page.
        table: its numbers.
    """

    name: str
    title: str
    note: str
    svg: Markup
    table: Table | None = None


@dataclass(frozen=True)
class Drawing:
    """A figure that is not saved yet; fields as in `Picture`."""

    name: str
    title: str
    note: str
    figure: Figure
    table: Table | None = None

    def save(self, folder: Path) -> Picture:
        """Writes NAME.png and NAME.svg."""
        svg = Markup(style.save(self.figure, folder / self.name))
        return Picture(self.name, self.title, self.note, svg, self.table)


def make_pictures(
    run: Run, runs: dict[str, Run], folder: Path, depths: Sequence[DepthRow], verified: Sequence[VerifiedRow]
) -> dict[str, Picture]:
    """Draws and saves the figures for which there are values.

    Args:
        runs: all that are compared, by name, `run` included.
        depths: of `run`, with what was measured of them.
        verified: its students in other runtimes.

    Returns:
        by name; empty if the teacher has not been measured.
    """
    if not run.teacher:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    drawings = [_quality(run, runs), _tasks(run)]
    if run.rounds:
        drawings += [*_importance(run), _costs(run), *_training(run), *_speed(depths, verified)]
    return {drawing.name: drawing.save(folder) for drawing in drawings}


def _quality(run: Run, runs: dict[str, Run]) -> Drawing:
    depths = {name: gather.depth_rows(each) for name, each in runs.items()}
    lines = [_line(name, runs[name], rows) for name, rows in depths.items() if rows]
    assert run.teacher
    floor = run.config.stop.min_quality
    return Drawing(
        "quality",
        "Quality against layers removed",
        "Aggregate of the tasks at each depth; bars are one standard error. The upper axis gives parameters; a step "
        "straight up or down at the end is a last pass of training.",
        figures.draw_quality(lines, f"aggregate ({run.config.aggregate})", floor and floor * run.teacher.aggregate),
        tables.quality_table(gather.quality_rows(runs)),
    )


def _line(name: str, run: Run, rows: Sequence[DepthRow]) -> figures.Line:
    return figures.Line(
        name=name,
        method=gather.method_of(run.config),
        removed=[row.round for row in rows],
        aggregate=[row.aggregate for row in rows],
        stderr=[row.aggregate_stderr for row in rows],
        parameters=[row.parameters for row in rows],
    )


def _tasks(run: Run) -> Drawing:
    shares = gather.task_kept(run)
    return Drawing(
        "tasks",
        "Tasks against layers removed",
        "Which skills go first: each task's score as a share of the teacher's (for perplexity, the inverse).",
        figures.draw_tasks(shares),
        tables.task_table(shares),
    )


def _importance(run: Run) -> list[Drawing]:
    """A heat map of the deciding metric, and one of the metric that made the shortlists."""
    assert run.teacher
    removed = [each.removed for each in run.rounds]
    drawings = []
    for role, name, how in (
        ("decides", "importance", "the deciding metric"),
        ("shortlist", "importance-shortlist", "the cheap metric, which made the shortlist"),
    ):
        rows = [row for row in gather.importance_rows(run) if row.role == role]
        if not rows:
            continue
        metric = one_line(rows[0].metric, 40)
        drawings.append(
            Drawing(
                name,
                f"Importance by {metric}",
                f"{metric}, {how}: what is lost when a layer is skipped, dark is little. × is the layer that the "
                "round removed, – one that was gone before, blank one that was not scored.",
                figures.draw_heat(rows, removed, run.teacher.layers, metric),
                tables.heat_table(f"{metric} by layer and round; × was removed", rows, removed),
            )
        )
    return drawings


def _costs(run: Run) -> Drawing:
    rows = gather.cost_rows(run)
    return Drawing(
        "costs",
        "Cost against loss",
        "Time of scoring, repair and training in each round, above the aggregate it lost (below 0: gained).",
        figures.draw_costs(rows),
        tables.cost_table(rows),
    )


def _training(run: Run) -> list[Drawing]:
    curves = gather.training_curves(run)
    if not curves:
        return []
    note = "Mean loss of each stretch of a round, and its parts without their weights."
    return [Drawing("training", "Training, by round", note, figures.draw_training(curves))]


def _speed(depths: Sequence[DepthRow], verified: Sequence[VerifiedRow]) -> list[Drawing]:
    timed = [row for row in verified if row.speed and row.round]
    if not timed:
        return []
    by_file: dict[str, list[VerifiedRow]] = {}
    for row in timed:
        by_file.setdefault(f"{row.name} {row.kind}", []).append(row)
    lines = [_speed_line(name, rows) for name, rows in by_file.items()]
    teacher = depths[0].speed
    if teacher:
        students = [(row.round, row.speed) for row in depths[1:] if row.speed and not row.last_pass]
        ratios = [teacher.ms_per_token / speed.ms_per_token for _, speed in students]
        lines.append(figures.SpeedLine("PyTorch, as measured for this report", [n for n, _ in students], ratios, []))
    return [
        Drawing(
            "speed",
            "Speed against layers removed",
            "How many times as fast as the teacher a student generates and reads a prompt, in each runtime and kind "
            "of file that was timed; medians of turns. Dotted: if layers were all that takes time.",
            figures.draw_speed(lines, timed[0].teacher_layers),
        )
    ]


def _speed_line(name: str, rows: Sequence[VerifiedRow]) -> figures.SpeedLine:
    speeds = [row.speed for row in rows if row.speed]
    return figures.SpeedLine(
        name=name,
        removed=[row.round for row in rows],
        generation=[speed.generation.ratio for speed in speeds],
        prompt=[speed.prompt.ratio for speed in speeds],
    )
