"""The report: one page that works offline, with its figures and tables in files beside it."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from layerpeel.processes.progress import console, plain, shown
from layerpeel.processes.text import count, duration, moment, number, one_line, percent, size
from layerpeel.report import figures, gather, style, tables
from layerpeel.report.measure import measurements
from layerpeel.report.tables import Table
from layerpeel.run.card import teacher_name
from layerpeel.run.folder import Run
from layerpeel.storage.files import write_whole

HERE = Path(__file__).parent
WATCH_SECONDS = 5


@dataclass(frozen=True)
class Picture:
    """A figure of the page, with the table of what it shows."""

    name: str
    title: str
    note: str
    svg: Markup
    table: Table | None = None


def write_report(
    run: Run, others: Sequence[Run] = (), output: Path | None = None, *, measure: bool = True, refresh: bool = False
) -> Path:
    """Writes the report of a run; gives the page.

    Args:
        others: runs to compare it with.
        output: a folder; `report` in the run's folder if not given.
        measure: rebuild the students and measure their speed, where that was not done before.
        refresh: let the page load itself again every few seconds.
    """
    folder = output or run.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    measured = measurements(run, measure=measure)
    depths = _with_speed(gather.depth_rows(run), measured)
    runs = dict(zip(gather.names_of([run, *others]), [run, *others], strict=True))
    pictures = _pictures(run, runs, depths, folder / "figures")
    tables.write_tables(folder / "tables", _files(run, runs, depths))
    facts = _facts(run, runs, depths, measured) | {
        "pictures": pictures,
        "figures": "figures/",
        "refresh": WATCH_SECONDS if refresh else None,
    }
    page = folder / "index.html"
    write_whole(page, render("page.html.jinja", facts))
    return page


def watch(run: Run, others: Sequence[Run] = (), output: Path | None = None) -> Path:
    """Keeps the report of a run up to date until the run has finished; never measures, so as not to disturb it."""
    page, seen = Path(), 0
    while True:
        if (now := run.journal.stat().st_mtime_ns) != seen:
            run, seen = Run(run.folder), now
            page = write_report(run, others, output, measure=False, refresh=not run.finish)
            console.print(f"round {len(run.rounds)}: {shown(page)}", style="dim")
        if run.finish:
            return page
        time.sleep(1)


def _with_speed(depths: list[dict[str, Any]], measured: dict[str, Any] | None) -> list[dict[str, Any]]:
    speeds = (measured or {}).get("depths")
    if not speeds:
        return depths
    keys = ("ms_per_token", "ms_per_token_least", "ms_per_token_most", "tokens_per_second", "peak_memory")
    return [row | {key: speeds[str(row["round"])][key] for key in keys} for row in depths]


def _files(run: Run, runs: dict[str, Run], depths: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    quality = [
        {
            "run": name,
            "removed": row["round"],
            **{
                key: row[key]
                for key in ("last_pass", "layers", "parameters", "aggregate", "aggregate_stderr", "kept_quality")
            },
        }
        for name, each in runs.items()
        for row in gather.depth_rows(each)
    ]
    return {
        "depths": tables.flat(depths),
        "quality": quality,
        "importance": gather.importance_rows(run),
        "removals": gather.removal_rows(run),
        "costs": gather.cost_rows(run),
    }


def _pictures(run: Run, runs: dict[str, Run], depths: list[dict[str, Any]], folder: Path) -> dict[str, Picture]:
    """The figures for which there are values, by name, drawn and saved."""
    if not depths:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [_quality(run, runs), _tasks(run)]
    if run.rounds:
        drawn += [*_heats(run), _costs(run)]
        if curves := gather.training_curves(run):
            note = "Mean loss of each stretch of a round, and its parts without their weights."
            drawn.append(("training", "Training, by round", note, figures.draw_training(curves), None))
    return {
        name: Picture(name, title, note, Markup(style.save(figure, folder / name)), table)
        for name, title, note, figure, table in drawn
    }


Drawn = tuple[str, str, str, Figure, Table | None]


def _quality(run: Run, runs: dict[str, Run]) -> Drawn:
    lines, rows = [], []
    for name, each in runs.items():
        depths = gather.depth_rows(each)
        if not depths:
            continue
        lines.append(
            figures.Line(
                name,
                gather.method_of(each.config),
                *([row[key] for row in depths] for key in ("round", "aggregate", "aggregate_stderr", "parameters")),
            )
        )
        rows += [row | {"run": name} for row in depths]
    floor = run.config.stop.min_quality
    assert run.teacher
    figure = figures.draw_quality(
        lines, f"aggregate ({run.config.aggregate})", floor and floor * run.teacher["aggregate"]
    )
    table = tables.simple_table(
        "Quality by run and depth",
        rows,
        {
            "run": ("run", one_line),
            "round": ("layers removed", str),
            "layers": ("layers", str),
            "parameters": ("parameters", count),
            "aggregate": ("aggregate", number),
            "aggregate_stderr": ("± stderr", number),
            "kept_quality": ("% kept", percent),
        },
    )
    note = (
        "Aggregate of the tasks at each depth; bars are one standard error. The upper axis gives parameters; a step "
        "straight up or down at the end is a last pass of training."
    )
    return "quality", "Quality against layers removed", note, figure, table


def _tasks(run: Run) -> Drawn:
    shares = gather.task_kept(run)
    rows = [
        {"removed": index} | {name: values[index] for name, values in shares.items()}
        for index in range(len(run.rounds) + 1)
    ]
    columns: Any = {"removed": ("layers removed", str)} | {name: (one_line(name, 40), percent) for name in shares}
    table = tables.simple_table("Each task's score as % of the teacher's", rows, columns)
    note = "Which skills go first: each task's score as a share of the teacher's (for perplexity, the inverse)."
    return "tasks", "Tasks against layers removed", note, figures.draw_tasks(shares), table


def _heats(run: Run) -> list[Drawn]:
    """A map for each metric that scored: the one that decides, and the one that made shortlists."""
    assert run.teacher
    removed = [event["removed"] for event in run.rounds]
    drawn: list[Drawn] = []
    for role in ("decides", "shortlist"):
        rows = [row for row in gather.importance_rows(run) if row["role"] == role]
        if not rows:
            continue
        metric = one_line(rows[0]["metric"], 40)
        figure = figures.draw_heat(rows, removed, run.teacher["layers"], metric)
        how = "the deciding metric" if role == "decides" else "the cheap metric, which made the shortlist"
        note = (
            f"{metric}, {how}: what is lost when a layer is skipped, dark is little. × is the layer that the round "
            "removed, – one that was gone before, blank one that was not scored."
        )
        table = tables.heat_table(f"{metric} by layer and round; × was removed", rows, removed)
        name = "importance" if role == "decides" else "importance-shortlist"
        drawn.append((name, f"Importance by {metric}", note, figure, table))
    return drawn


def _costs(run: Run) -> Drawn:
    rows = gather.cost_rows(run)
    table = tables.simple_table("What each round took, and what it lost", rows, tables.COSTS)
    note = "Time of scoring and training in each round, above the aggregate that the round lost (below 0: gained)."
    return "costs", "Cost against loss", note, figures.draw_costs(rows), table


def _facts(
    run: Run, runs: dict[str, Run], depths: list[dict[str, Any]], measured: dict[str, Any] | None
) -> dict[str, Any]:
    """What the page says beside figures."""
    state, note = gather.state_of(run)
    start: dict[str, Any] = next((event for event in run.events if event["event"] == "start"), {})
    row = gather.result_row(depths, run) if depths else None
    speed = bool(measured and "depths" in measured)
    return {
        "name": next(iter(runs)),
        "others": list(runs)[1:],
        "state": state,
        "state_note": note,
        "result": gather.result_round(run),
        "last_pass": gather.last_pass(run),
        "first": depths[0] if depths else None,
        "last": None if row is None else depths[row],
        "before": depths[gather.result_round(run)] if depths else None,
        "depths": tables.depth_table(depths, row, measured=speed) if depths else None,
        "removals": tables.simple_table("Layers removed, in order", gather.removal_rows(run), tables.REMOVALS),
        "seconds": gather.seconds_of(run),
        "measured": measured,
        "speed": speed,
        "findings": [event for event in run.events if event["event"] == "finding"],
        "versions": start.get("versions", {}),
        "machine": start.get("machine", {}),
        "started": start.get("time"),
        "ended": run.events[-1]["time"] if run.events else None,
        "config": run.config_text,
        "method": gather.method_of(run.config),
        "teacher": teacher_name(run.config.teacher),
        "hashes": gather.hashes(run),
        "command": gather.command_of(run),
    }


def render(template: str, facts: dict[str, Any]) -> str:
    """A page from a template of this folder, with our style and script in it; what is not ours is escaped."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "plain": plain,
        "line": one_line,
        "number": number,
        "percent": percent,
        "count": count,
        "size": size,
        "duration": duration,
        "moment": moment,
        "breakable": lambda text: escape(text).replace("_", Markup("_<wbr>")),
    }
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = {"script": Markup(script), "script_hash": digest, "style": Markup((HERE / "page.css").read_text("utf-8"))}
    return environment.get_template(template).render(facts | own)
