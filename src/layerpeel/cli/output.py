"""What the commands print: results to stdout, from the main process alone, and estimates to stderr."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from layerpeel.cli.tables import run_table, score_table
from layerpeel.processes.distributed import is_main_process
from layerpeel.processes.progress import console, shown

if TYPE_CHECKING:
    from layerpeel.importance.estimate import Estimate
    from layerpeel.importance.scores import LayerScores
    from layerpeel.run.folder import Run

# Too wide a table would be cut to the terminal's width; at 140 columns it wraps instead, and keeps its numbers.
stdout = Console(highlight=False, width=max(140, Console().width), quiet=not is_main_process())


def finish_run(run: Run, as_json: bool, report: bool = True) -> None:
    """Writes the report of a finished run and prints its result; exits with 3 if the quality floor stopped it."""
    assert run.finish
    if is_main_process():
        from layerpeel.report.page import write_report

        page = None
        try:
            page = write_report(run) if report else None
        finally:  # whatever becomes of the report
            print_run(run, page, as_json)
    if run.finish.reason == "min_quality":
        console.print(f"stopped by the quality floor; the student is that of round {run.finish.round}")
        sys.exit(3)


def print_run(run: Run, page: Path | None, as_json: bool) -> None:
    """Prints a finished run: its rounds, and where its student, report and record are."""
    assert run.teacher and run.finish
    if as_json:
        from layerpeel.run.events import event_to_json

        print(
            json.dumps(
                {
                    "teacher": event_to_json(run.teacher),
                    "rounds": [event_to_json(each.scored) | event_to_json(each.end) for each in run.rounds],
                    "finish": event_to_json(run.finish),
                    "student": str(run.student_folder),
                    "report": str(page) if page else None,
                }
            )
        )
        return
    from layerpeel.report.gather import REASONS

    stdout.print(run_table(run))
    stdout.print(f"ended    {REASONS[run.finish.reason]}")
    for name, path in (("student", run.student_folder), ("report", page), ("record", run.journal)):
        if path:
            stdout.print(f"{name:8} {shown(path)}", soft_wrap=True)


def print_estimates(estimates: list[Estimate]) -> None:
    """Prints to stderr what scoring will take, for each metric."""
    for each in estimates:
        console.print(
            f"{each.metric}: {each.tokens:,} tokens, {each.layer_runs} layer runs on each (one by one: "
            f"{each.one_by_one}), about {each.seconds:,.0f} s, up to {each.memory / 2**30:.2g} GB beside the weights",
            style="dim",
            soft_wrap=True,
        )


def write_scores(scores: LayerScores, folder: Path, as_json: bool) -> None:
    """Writes scores.json and importance.png to a folder, and prints the scores."""
    from layerpeel.report.figures import draw_importance
    from layerpeel.run.results_json import scores_to_json

    text = json.dumps(scores_to_json(scores), ensure_ascii=False)
    (folder / "scores.json").write_text(text + "\n", encoding="utf-8")
    draw_importance(scores, folder / "importance.png")
    if as_json:
        print(json.dumps(scores_to_json(scores)))
        return
    stdout.print(score_table(scores))
    stdout.print(f"scores   {shown(folder / 'scores.json')}", soft_wrap=True)
    stdout.print(f"picture  {shown(folder / 'importance.png')}", soft_wrap=True)
