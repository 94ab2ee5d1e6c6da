"""Runs a study and writes its tables, its figure and its page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure

from layerpeel.report import style
from layerpeel.report.page import provenance, render
from layerpeel.report.pictures import Picture
from layerpeel.report.tables import Table, write_tables
from layerpeel.run.card import teacher_name
from layerpeel.run.folder import Run
from layerpeel.storage.files import write_whole
from layerpeel.study import charts, results, tables
from layerpeel.study.file import Job, StudyConfig, load_study
from layerpeel.study.rankings import Rankings
from layerpeel.study.rows import StudyRows
from layerpeel.study.running import run_jobs


@dataclass(frozen=True)
class Study:
    """A finished study.

    Attributes:
        folder: where its files are: index.html, tables.md, each table as CSV and JSON, figure.png and figure.svg, and
            study.json, which says how it was made.
        rows: of each table.
        tables: the tables for people, by the names of the files.
    """

    folder: Path
    rows: StudyRows
    tables: dict[str, Table]


def run_study(path: Path, overrides: Sequence[str] = (), processes: int = 1) -> Study:
    """Runs a study, or what is left of it, and writes its tables and its figure.

    Args:
        path, overrides: as for `load_study`.
        processes: runs at a time.

    Raises:
        InputError: something in the study, its models or its data will not do.
        RunError: a run failed; running again goes on.
    """
    config, jobs = load_study(path, overrides)
    runs = run_jobs(jobs, processes)
    command = ["layerpeel", "study", str(path), *(part for text in overrides for part in ("--set", text))]
    return write_study(config, path.stem, jobs, runs, shlex.join(command))


def write_study(config: StudyConfig, name: str, jobs: Sequence[Job], runs: Sequence[Run], command: str) -> Study:
    """Writes the files of a study whose runs are finished.

    Args:
        runs: one a job.
        command: what made it.

    Raises:
        InputError: the figure cannot be drawn of these runs; the tables are written.
    """
    groups = results.by_variant(jobs, runs)
    rows = StudyRows(results.result_rows(jobs, groups), results.depth_rows(groups))
    try:
        figure = _figure(config, groups, rows)
    finally:  # a figure may have nothing to show
        shown = _write_tables(config.output, rows)
    svg = style.save(figure, config.output / "figure")
    note = charts.NOTES[config.show]
    start = runs[0].start
    facts = {
        "name": name,
        "command": command,
        "runs": len(runs),
        "machine": start.machine.model_dump() if start else {},
        "seconds": results.seconds_in_all(runs),
        "note": note,
    }
    write_whole(config.output / "study.json", json.dumps(facts, ensure_ascii=False, indent=1) + "\n")
    page = render(
        "study.html.jinja",
        {
            "name": name,
            "runs": len(runs),
            "variants": len(groups),
            "tables": shown,
            "command": command,
            "figures": "",
            "teachers": sorted({teacher_name(job.config.teacher) for job in jobs}),
            "pictures": {"figure": Picture("figure", name, note, Markup(svg))},
            **provenance(start),
        },
    )
    write_whole(config.output / "index.html", page)
    return Study(config.output, rows, shown)


def _write_tables(folder: Path, rows: StudyRows) -> dict[str, Table]:
    """Writes the rows to files, and returns the tables for people."""
    write_tables(folder, rows.tables())
    shown = tables.tables_of(rows)
    write_whole(folder / "tables.md", "\n\n".join(map(tables.markdown, shown.values())) + "\n")
    return shown


def _figure(config: StudyConfig, groups: dict[str, list[Run]], rows: StudyRows) -> Figure:
    """The study's figure; adds to `rows` those that only this figure shows."""
    first = next(iter(groups.values()))[0]
    assert first.teacher
    teacher = first.teacher.aggregate
    if config.show == "rankings":
        rankings = Rankings(first)
        rows.rankings, rows.tau = rankings.rows(), rankings.taus()
        return charts.draw_taus(rows.tau)
    if config.show == "layers":
        rows.layers = results.layer_rows(groups)
        return charts.draw_layers(rows.layers)
    if config.show == "sweep":
        return charts.draw_sweep(rows.results, next(iter(config.grid)), teacher)
    if config.show == "costs":
        return charts.draw_costs(rows.results, teacher)
    if config.show == "results":
        return charts.draw_results(rows.results, teacher)
    seeds = f"{len(config.seeds)} seed" + ("s" if len(config.seeds) > 1 else "")
    return charts.draw_depths(rows.depths, dict.fromkeys(groups, seeds))
