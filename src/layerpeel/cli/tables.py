"""Tables as the commands print them."""

from __future__ import annotations

from rich.table import Table

from layerpeel.importance.scores import LayerScores
from layerpeel.plan.planning import Plan
from layerpeel.processes.progress import shown
from layerpeel.processes.text import count, duration, size
from layerpeel.report import tables
from layerpeel.run.folder import Run
from layerpeel.tasks.scores import Evaluation


def run_table(run: Run) -> Table:
    assert run.teacher
    names = list(run.teacher["evaluation"])
    columns = [
        "round",
        "removed",
        "layers",
        "params",
        "aggregate",
        "% of\nteacher",
        *(shown(name).replace("_", "\n") for name in names),
    ]
    table = Table(*columns, box=None, header_style="bold")
    start = {"round": "-", "removed": "-", "kept": range(run.teacher["layers"])}
    for event in [run.teacher | start, *run.rounds]:
        cells = [event["round"], event["removed"], len(event["kept"]), f"{event['parameters'] / 1e6:.2f} M"]
        quality = [f"{event['aggregate']:.3f}", f"{100 * event['kept_quality']:.1f}"]
        scores = [_number(event["evaluation"][name]["value"]) for name in names]
        table.add_row(*map(str, cells), *quality, *scores)
    return table


def score_table(scores: LayerScores) -> Table:
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


def plan_tables(planned: Plan) -> list[Table | str]:
    memory = Table("memory of each device", "training", "scoring", box=None, header_style="bold")
    parts = planned.training_memory, planned.scoring_memory
    for part in dict.fromkeys([*planned.training_memory, *planned.scoring_memory]):
        memory.add_row(part, *(size(own[part]) if part in own else "" for own in parts))
    memory.add_row("in all", *(size(sum(own.values())) for own in parts), style="bold")
    work = Table("work", "tokens × layers", "time", box=None, header_style="bold")
    for part, seconds in planned.seconds.items():
        work.add_row(part, count(planned.layer_tokens[part]), duration(seconds))
    work.add_row(
        "in all", count(sum(planned.layer_tokens.values())), duration(sum(planned.seconds.values())), style="bold"
    )
    return [f"{planned.rounds} rounds, {count(planned.trained)} parameters in training", memory, "", work]


def report_table(own: tables.Table) -> Table:
    """A table of a report or a study."""
    table = Table(*map(shown, own.heads), box=None, header_style="bold", title=own.caption, title_justify="left")
    for row in own.rows:
        table.add_row(*(shown(cell.text) for cell in row))
    return table


def evaluation_table(evaluation: Evaluation) -> Table:
    table = Table("task", "score", "stderr", "n", box=None, header_style="bold")
    for name, score in evaluation.scores.items():
        table.add_row(shown(name), _number(score.value), _number(score.stderr), str(score.n))
    return table


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
