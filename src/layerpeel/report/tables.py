"""Tables: as CSV and JSON files, and as cells of an HTML page."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from layerpeel.processes.text import count, duration, number, one_line, percent, size
from layerpeel.report.measurements import DepthSpeed
from layerpeel.report.rows import CostRow, DepthRow, ImportanceRow, QualityRow, RemovalRow, TableRow
from layerpeel.report.runtimes import Rates, RuntimeSpeed, VerifiedRow

R = TypeVar("R")


@dataclass(frozen=True)
class Cell:
    """A cell: the text shown, and the value to sort by."""

    text: str
    key: float | str | None


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        caption: what it shows.
        heads: a title for each column.
        rows: a cell for each column; the first one is the row's header.
        marked: index of the row to highlight.
        sortable: whether a click on a title sorts by its column.
    """

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    marked: int | None = None
    sortable: bool = False


@dataclass(frozen=True)
class Column(Generic[R]):
    """A column of a table: its title, and its cell for a row."""

    head: str
    cell: Callable[[R], Cell]


def column(head: str, value: Callable[[R], Any], write: Callable[[Any], str] = str) -> Column[R]:
    """A column that shows one value of the row.

    Args:
        write: the text of a value.
    """
    return Column(head, lambda row: Cell(write(value(row)), value(row)))


def make_table(caption: str, rows: Sequence[R], columns: Sequence[Column[R]]) -> Table:
    return Table(caption, [each.head for each in columns], [[each.cell(row) for each in columns] for row in rows])


def write_tables(folder: Path, tables: Mapping[str, Sequence[TableRow]]) -> None:
    """Writes NAME.csv and NAME.json for each table."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        lines = [row.columns() for row in rows]
        (folder / f"{name}.json").write_text(json.dumps(lines, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([map(_no_formula, lines[0])] if lines else [])
            writer.writerows(map(_no_formula, line.values()) for line in lines)


def _no_formula(value: Any) -> Any:
    """The value, with a quote before a text that a spreadsheet would take for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def depth_table(rows: Sequence[DepthRow], marked: int | None) -> Table:
    """The depths to choose from.

    Args:
        rows: that of the teacher first.
        marked: index of the row to highlight.
    """
    columns: list[Column[DepthRow]] = [
        Column("layers", lambda row: Cell(str(row.layers) + (", last pass" if row.last_pass else ""), row.layers)),
        column("removed", lambda row: row.removed, lambda layer: "–" if layer is None else str(layer)),
        column("parameters", lambda row: row.parameters, count),
        column("% of params", lambda row: row.parameters_kept, percent),
        *([column("on disk", lambda row: row.bytes, size)] if any(row.bytes for row in rows) else []),
        Column("aggregate", lambda row: _with_error(row.aggregate, row.aggregate_stderr)),
        column("% kept", lambda row: row.kept_quality, percent),
        *(_speed_columns() if rows[0].speed else []),
        *(_task_column(task, score.lower_is_better) for task, score in rows[0].evaluation.scores.items()),
    ]
    caption = "Layers, size, quality and speed of each depth; ± is one standard error"
    return replace(make_table(caption, rows, columns), marked=marked, sortable=True)


def _speed_columns() -> list[Column[DepthRow]]:
    def speed_of(row: DepthRow) -> DepthSpeed:
        assert row.speed
        return row.speed

    def latency(row: DepthRow) -> Cell:
        speed = speed_of(row)
        median, least, most = speed.ms_per_token, speed.ms_per_token_least, speed.ms_per_token_most
        return Cell(f"{number(median, 2)} ({number(least, 2)}–{number(most, 2)})", median)

    return [
        Column("ms/token", latency),
        column("tokens/s", lambda row: speed_of(row).tokens_per_second, lambda rate: f"{rate:,.0f}"),
        column("peak memory", lambda row: speed_of(row).peak_memory, size),
    ]


def _task_column(task: str, lower_is_better: bool) -> Column[DepthRow]:
    def cell(row: DepthRow) -> Cell:
        score = row.evaluation.scores[task]
        return _with_error(score.value, score.stderr)

    return Column(one_line(task, 40) + (" (lower is better)" if lower_is_better else ""), cell)


def _with_error(value: float, stderr: float | None) -> Cell:
    return Cell(number(value) + (f" ± {number(stderr)}" if stderr else ""), value)


def quality_table(rows: Sequence[QualityRow]) -> Table:
    columns: list[Column[QualityRow]] = [
        column("run", lambda row: row.run, one_line),
        column("layers removed", lambda row: row.removed),
        column("layers", lambda row: row.layers),
        column("parameters", lambda row: row.parameters, count),
        column("aggregate", lambda row: row.aggregate, number),
        column("± stderr", lambda row: row.aggregate_stderr, number),
        column("% kept", lambda row: row.kept_quality, percent),
    ]
    return make_table("Quality by run and depth", rows, columns)


def task_table(shares: Mapping[str, Sequence[float | None]]) -> Table:
    """Each task's score at each depth.

    Args:
        shares: of the teacher's score, by task.
    """
    depths = range(max(map(len, shares.values()), default=0))

    def share_column(task: str) -> Column[int]:
        return column(one_line(task, 40), lambda depth: shares[task][depth], percent)

    columns = [column("layers removed", lambda depth: depth), *map(share_column, shares)]
    return make_table("Each task's score as % of the teacher's", depths, columns)


def heat_table(caption: str, rows: Sequence[ImportanceRow], removed: Sequence[int]) -> Table:
    """The numbers of the heat map: importance by teacher layer (down) and round (across).

    Args:
        removed: the layer that each round removed.
    """
    scores = {(row.layer, row.round): row for row in rows}

    def cell(layer: int, round_: int) -> Cell:
        row = scores.get((layer, round_))
        if not row:
            return Cell("", None)
        error = f" ± {_number4(row.stderr)}" if row.stderr else ""
        return Cell(_number4(row.importance) + error + (" ×" if row.removed else ""), row.importance)

    def round_column(round_: int) -> Column[int]:
        return Column(f"round {round_}", lambda layer: cell(layer, round_))

    columns = [column("layer", lambda layer: layer), *map(round_column, range(1, len(removed) + 1))]
    return make_table(caption, sorted({row.layer for row in rows}), columns)


def cost_table(rows: Sequence[CostRow]) -> Table:
    repair: list[Column[CostRow]] = [
        column("repair", lambda row: row.repair_seconds, duration),
        column("error before", lambda row: row.error_before, _number4),
        column("error after", lambda row: row.error_after, _number4),
    ]
    columns: list[Column[CostRow]] = [
        column("round", lambda row: row.round),
        column("layer removed", lambda row: row.removed),
        column("scoring", lambda row: row.scoring_seconds, duration),
        column("healing on trial", lambda row: row.healing_seconds, duration),
        *(repair if any(row.error_before is not None for row in rows) else []),
        column("training", lambda row: row.training_seconds, duration),
        column("tokens trained on", lambda row: row.training_tokens, lambda tokens: f"{tokens:,}"),
        column("first loss", lambda row: row.first_loss, _number4),
        column("last loss", lambda row: row.last_loss, _number4),
        column("aggregate lost", lambda row: row.aggregate_lost, number),
    ]
    return make_table("What each round took, and what it lost", rows, columns)


def removal_table(rows: Sequence[RemovalRow]) -> Table:
    answers = {True: "same layer", False: "another", None: "–"}
    columns: list[Column[RemovalRow]] = [
        column("round", lambda row: row.round),
        column("teacher layer", lambda row: row.removed),
        column("by", lambda row: row.metric, one_line),
        column("importance", lambda row: row.importance, _number4),
        column("± stderr", lambda row: row.stderr, _number4),
        column("candidates", lambda row: row.candidates),
        column("scored by it", lambda row: row.scored),
        column("cheap metric alone", lambda row: row.cheap_chooses_same, lambda same: answers[same]),
    ]
    return make_table("Layers removed, in order", rows, columns)


def runtime_table(rows: Sequence[VerifiedRow]) -> Table:
    """Students in other runtimes: whether they are right, how large, and how fast beside the teacher."""
    timed = any(row.speed for row in rows)
    columns: list[Column[VerifiedRow]] = [
        column("runtime", lambda row: row.runtime, one_line),
        column("file", lambda row: row.kind, one_line),
        Column("layers", lambda row: Cell(str(row.layers) + (", last pass" if row.last_pass else ""), row.layers)),
        Column("verdict", lambda row: Cell(f"{'right' if row.right else 'WRONG'}, as {row.precision}", row.precision)),
        column("mean KL", lambda row: row.mean_kl, lambda kl: f"{kl:.2g}"),
        column("same top token", lambda row: row.same_top, lambda share: f"{percent(share)} %"),
        Column("size", _sizes),
        *(_rate_columns("prompt", lambda speed: speed.prompt) if timed else []),
        *(_rate_columns("generated", lambda speed: speed.generation) if timed else []),
        *([column("ratio of layers", lambda row: row.layers_ratio, lambda ratio: number(ratio, 2))] if timed else []),
    ]
    return make_table("Verified in other runtimes; sizes and speeds: teacher → student", rows, columns)


def _sizes(row: VerifiedRow) -> Cell:
    return Cell((f"{size(row.teacher_bytes)} → " if row.teacher_bytes else "") + size(row.bytes), row.bytes)


def _rate_columns(title: str, rates_of: Callable[[RuntimeSpeed], Rates]) -> list[Column[VerifiedRow]]:
    def both(row: VerifiedRow) -> Cell:
        if not row.speed:
            return Cell("–", None)
        rates = rates_of(row.speed)
        return Cell(f"{number(rates.teacher, 1)} → {number(rates.student, 1)}", rates.student)

    def ratio(row: VerifiedRow) -> float | None:
        return rates_of(row.speed).ratio if row.speed else None

    return [Column(f"{title} tokens/s", both), column("ratio", ratio, lambda value: number(value, 2))]


def _number4(value: float | None) -> str:
    return number(value, 4)
