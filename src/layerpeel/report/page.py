"""The report of a run: an HTML page without external resources, with its figures and tables as files beside it."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from layerpeel.processes.progress import console, plain, shown
from layerpeel.processes.text import count, duration, moment, number, one_line, percent, size
from layerpeel.report import gather, tables
from layerpeel.report.measure import measurements
from layerpeel.report.measurements import Measurements, NotMeasured
from layerpeel.report.pictures import make_pictures
from layerpeel.report.rows import DepthRow, TableRow
from layerpeel.report.runtimes import VerifiedRow, verified_rows
from layerpeel.report.serving import serve_commands
from layerpeel.run.card import teacher_name
from layerpeel.run.events import Machine, Start
from layerpeel.run.folder import Run
from layerpeel.storage.files import write_whole

TEMPLATES = Path(__file__).parent
WATCH_SECONDS = 5  # between two reloads of a page that is kept fresh


def write_report(
    run: Run, others: Sequence[Run] = (), output: Path | None = None, *, measure: bool = True, refresh: bool = False
) -> Path:
    """Writes the report of a run.

    Args:
        others: runs to compare it with.
        output: a folder; `report` in the run's folder if not given.
        measure: rebuild the students and measure their speed, unless that was done before.
        refresh: let the page reload itself every few seconds.

    Returns:
        the page's path.
    """
    folder = output or run.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    measured = measurements(run, measure=measure)
    depths = gather.depth_rows(run)
    if isinstance(measured, Measurements):
        depths = [replace(row, speed=measured.depths[row.round]) for row in depths]
    runs = dict(zip(gather.names_of([run, *others]), [run, *others], strict=True))
    verified = verified_rows(run)
    pictures = make_pictures(run, runs, folder / "figures", depths, verified)
    tables.write_tables(folder / "tables", _files(run, runs, depths) | {"runtimes": verified})
    context = _context(run, list(runs), depths, measured) | _runtimes(run, verified)
    context |= {"pictures": pictures, "figures": "figures/", "refresh": WATCH_SECONDS if refresh else None}
    page = folder / "index.html"
    write_whole(page, render("page.html.jinja", context))
    return page


def watch(run: Run, others: Sequence[Run] = (), output: Path | None = None) -> Path:
    """Rewrites the report whenever the run's journal grows, until the run has finished; measures nothing."""
    page, written = Path(), 0
    while True:
        if (changed := run.journal.stat().st_mtime_ns) != written:
            run, written = Run(run.folder), changed
            page = write_report(run, others, output, measure=False, refresh=not run.finish)
            console.print(f"round {len(run.rounds)}: {shown(page)}", style="dim")
        if run.finish:
            return page
        time.sleep(1)


def _files(run: Run, runs: dict[str, Run], depths: Sequence[DepthRow]) -> dict[str, Sequence[TableRow]]:
    return {
        "depths": depths,
        "quality": gather.quality_rows(runs),
        "importance": gather.importance_rows(run),
        "removals": gather.removal_rows(run),
        "costs": gather.cost_rows(run),
    }


def _context(
    run: Run, names: Sequence[str], depths: Sequence[DepthRow], measured: Measurements | NotMeasured | None
) -> dict[str, Any]:
    """The page template's variables, except figures.

    Args:
        names: of the run and of those that it is compared with.
    """
    state, note = gather.state_of(run)
    result = gather.result_row(depths, run) if depths else None
    return {
        "name": names[0],
        "others": names[1:],
        "state": state,
        "state_note": note,
        "result": run.result_round,
        "last_pass": run.last_pass,
        "first": depths[0] if depths else None,
        "last": None if result is None else depths[result],
        "before": depths[run.result_round] if depths else None,
        "depths": tables.depth_table(depths, result) if depths else None,
        "removals": tables.removal_table(gather.removal_rows(run)),
        "costs": gather.costs_of(run),
        "measured": measured if isinstance(measured, Measurements) else None,
        "problem": measured.problem if isinstance(measured, NotMeasured) else None,
        "findings": run.findings,
        "teacher_texts": run.teacher_texts,
        **provenance(run.start),
        "started": run.start.time if run.start else None,
        "ended": run.events[-1].time if run.events else None,
        "config": run.config_text,
        "method": gather.method_of(run.config),
        "teacher": teacher_name(run.config.teacher),
        "hashes": gather.hashes(run),
        "command": gather.command_of(run),
    }


def _runtimes(run: Run, verified: Sequence[VerifiedRow]) -> dict[str, Any]:
    """The template's variables on other runtimes."""
    machines: list[Machine] = []
    for row in verified:
        machines += [row.machine] if row.machine not in machines else []
    return {
        "runtimes": tables.runtime_table(verified),
        "runtime_speed": next((row.speed for row in verified if row.speed), None),
        "runtime_machines": machines,
        "serve": serve_commands(run, verified),
    }


def provenance(start: Start | None) -> dict[str, Any]:
    """The template variables `versions` and `machine`: what a run was made with, if that was recorded."""
    return {"versions": start.versions if start else {}, "machine": start.machine if start else None}


def render(template: str, context: dict[str, Any]) -> str:
    """Renders a template of this folder, with the style sheet and the script inlined and all other values escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
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
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    inlined = {
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "style": Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
    }
    return environment.get_template(template).render(context | inlined)
