"""Tables: as CSV and JSON for machines, and as cells for the page."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layerpeel.processes.text import count, duration, number, one_line, percent, size

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """What is shown, and what it sorts by."""

    text: str
    key: float | str | None


@dataclass(frozen=True)
class Table:
    """A table of the page.

    Attributes:
        caption: what it shows.
        heads: a title for each column.
        rows: a cell for each column; the first one heads its row.
        marked: the row to point out.
    """

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    marked: int | None = None
    sortable: bool = field(default=False)


def write_tables(folder: Path, tables: dict[str, list[Row]]) -> None:
    """Writes NAME.csv and NAME.json for each table."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(_no_formula(key) for key in rows[0]) if rows else None
            writer.writerows(map(_no_formula, row.values()) for row in rows)


def _no_formula(value: Any) -> Any:
    """A text that a spreadsheet will not take for a formula."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def flat(rows: Iterable[Row]) -> list[Row]:
    """Depths without nested values: a column for each task's score, its standard error and its n."""
    flattened = []
    for row in rows:
        tasks = row["tasks"]
        own = {key: value for key, value in row.items() if key != "tasks"}
        for task, score in tasks.items():
            own |= {task: score["value"], f"{task} stderr": score["stderr"], f"{task} n": score["n"]}
        flattened.append(own)
    return flattened


def depth_table(rows: Sequence[Row], marked: int | None, *, measured: bool) -> Table:
    """The depths to choose from."""
    tasks = list(rows[0]["tasks"])
    speed = ["ms/token", "tokens/s", "peak memory"] if measured else []
    sizes = ["on disk"] if any(row["bytes"] for row in rows) else []
    heads = ["layers", "removed", "parameters", "% of params", *sizes, "aggregate", "% kept", *speed]
    return Table(
        caption="Layers, size, quality and speed of each depth; ± is one standard error",
        heads=[*heads, *(one_line(task, 40) + _arrow(rows[0]["tasks"][task]) for task in tasks)],
        rows=[_depth_cells(row, tasks, sizes=bool(sizes), measured=measured) for row in rows],
        marked=marked,
        sortable=True,
    )


def _arrow(score: Row) -> str:
    return " (lower is better)" if score["lower_is_better"] else ""


def _depth_cells(row: Row, tasks: Sequence[str], *, sizes: bool, measured: bool) -> list[Cell]:
    cells = [
        Cell(str(row["layers"]) + (", last pass" if row["last_pass"] else ""), row["layers"]),
        Cell("–" if row["removed"] is None else str(row["removed"]), row["removed"]),
        Cell(count(row["parameters"]), row["parameters"]),
        Cell(percent(row["parameters_kept"]), row["parameters_kept"]),
        *([Cell(size(row["bytes"]), row["bytes"])] if sizes else []),
        _with_error(row["aggregate"], row["aggregate_stderr"]),
        Cell(percent(row["kept_quality"]), row["kept_quality"]),
    ]
    if measured:
        cells += [
            Cell(
                f"{number(row['ms_per_token'], 2)} ({number(row['ms_per_token_least'], 2)}–"
                f"{number(row['ms_per_token_most'], 2)})",
                row["ms_per_token"],
            ),
            Cell(f"{row['tokens_per_second']:,.0f}", row["tokens_per_second"]),
            Cell(size(row["peak_memory"]), row["peak_memory"]),
        ]
    return [*cells, *(_with_error(row["tasks"][task]["value"], row["tasks"][task]["stderr"]) for task in tasks)]


def _with_error(value: float, stderr: float | None) -> Cell:
    return Cell(number(value) + (f" ± {number(stderr)}" if stderr else ""), value)


def simple_table(caption: str, rows: Sequence[Row], columns: dict[str, tuple[str, Callable[[Any], str]]]) -> Table:
    """A table of some of the rows' values: for each key, its title and how it is written."""
    return Table(
        caption=caption,
        heads=[head for head, _ in columns.values()],
        rows=[[Cell(write(row[key]), row[key]) for key, (_, write) in columns.items()] for row in rows],
    )


def heat_table(caption: str, rows: Sequence[Row], removed: Sequence[int]) -> Table:
    """Importance by teacher layer (down) and round (across), as behind the heat map."""
    scores = {(row["layer"], row["round"]): row for row in rows}
    layers = sorted({row["layer"] for row in rows})
    rounds = range(1, len(removed) + 1)

    def cell(layer: int, number_: int) -> Cell:
        row = scores.get((layer, number_))
        if not row:
            return Cell("", None)
        error = f" ± {number(row['stderr'], 4)}" if row["stderr"] else ""
        return Cell(number(row["importance"], 4) + error + (" ×" if row["removed"] else ""), row["importance"])

    heads = ["layer", *(f"round {number_}" for number_ in rounds)]
    return Table(caption, heads, [[Cell(str(layer), layer), *(cell(layer, n) for n in rounds)] for layer in layers])


COSTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "round": ("round", str),
    "removed": ("layer removed", str),
    "scoring_seconds": ("scoring", duration),
    "healing_seconds": ("healing on trial", duration),
    "training_seconds": ("training", duration),
    "training_tokens": ("tokens trained on", lambda value: f"{value:,}"),
    "first_loss": ("first loss", lambda value: number(value, 4)),
    "last_loss": ("last loss", lambda value: number(value, 4)),
    "aggregate_lost": ("aggregate lost", number),
}
REMOVALS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "round": ("round", str),
    "removed": ("teacher layer", str),
    "metric": ("by", one_line),
    "importance": ("importance", lambda value: number(value, 4)),
    "stderr": ("± stderr", lambda value: number(value, 4)),
    "candidates": ("candidates", str),
    "scored": ("scored by it", str),
    "cheap_chooses_same": ("cheap metric alone", lambda same: {True: "same layer", False: "another", None: "–"}[same]),
}
