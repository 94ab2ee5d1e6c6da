"""The commands over what runs and studies have left, one thin function each; see `verbs`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from layerpeel.cli.app import app
from layerpeel.cli.deploying import export, verify
from layerpeel.cli.inputs import AsJson, Teacher, expand_home
from layerpeel.cli.output import stdout
from layerpeel.cli.tables import families_table, listing_table, report_table
from layerpeel.model.family_table import OTHERS, ROUND_TRIP, TESTED, families_json, families_markdown
from layerpeel.processes.progress import shown
from layerpeel.storage.outputs import check_output


@app.command()
def families(
    as_json: AsJson = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the page docs/families.md.")] = False,
) -> None:
    """List the model families that are tested, and those that are refused, with the reasons."""
    if as_json:
        print(json.dumps(families_json()))
    elif as_markdown:
        print(families_markdown(), end="")
    else:
        stdout.print(families_table(), TESTED, OTHERS, ROUND_TRIP, sep="\n")


@app.command()
def study(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A YAML study; see studies/.")],
    set_: Annotated[
        list[str], typer.Option("--set", help="field=value, of the study or over its base's; model=PATH: the teacher.")
    ] = [],  # noqa: B006
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time, each with its share of the cores.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Run the variants of a study, with each seed, to one table and one figure. Running again goes on."""
    from layerpeel.study.writing import run_study

    finished = run_study(file, set_, processes)
    if as_json:
        rows = {name: [row.columns() for row in rows] for name, rows in finished.rows.tables().items()}
        print(json.dumps({"output": str(finished.folder), **rows}))
        return
    for table in finished.tables.values():
        stdout.print(report_table(table), "")
    stdout.print(f"page     {shown(finished.folder / 'index.html')}", soft_wrap=True)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="A run's folder; more to compare it with.")],
    output_: Annotated[
        Path | None,
        typer.Option("--output", "-o", parser=expand_home, metavar="PATH", help="A folder; RUN/report if not given."),
    ] = None,
    set_: Teacher = [],  # noqa: B006
    measure: Annotated[bool, typer.Option(help="Measure speed and memory, where not done before.")] = True,
    watch_: Annotated[bool, typer.Option("--watch", help="Keep the page fresh until the run has finished.")] = False,
) -> None:
    """Write the report of a run: a page that works offline, with its figures and tables in files beside it."""
    from layerpeel.report.page import watch, write_report
    from layerpeel.run.folder import Run
    from layerpeel.run.places import find_places

    first, *others = map(Run, runs)
    find_places(first, set_)
    check_output(output_ or first.folder / "report", first.config.teacher)
    page = watch(first, others, output_) if watch_ else write_report(first, others, output_, measure=measure)
    stdout.print(f"report   {shown(page)}", soft_wrap=True)


app.command()(export)
app.command()(verify)


@app.command()
def ls(folder: Annotated[Path, typer.Argument(help="Where to look.")] = Path("runs"), as_json: AsJson = False) -> None:
    """List the runs below a folder, and how far each has come."""
    from layerpeel.report.listing import list_runs

    statuses = list_runs(folder)
    if as_json:
        print(json.dumps([asdict(status) for status in statuses]))
        return
    stdout.print(listing_table(statuses) if statuses else f"no runs below {shown(folder)}")
