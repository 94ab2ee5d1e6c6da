"""The tables of studies, as people read them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from layerpeel.processes.text import count, duration, number, one_line, percent
from layerpeel.report.tables import Table, simple_table

Row = dict[str, Any]


def markdown(table: Table) -> str:
    """A table in Markdown, in which text is nothing but text."""
    lines = [
        table.heads,
        ["---", *["---:" for _ in table.heads[1:]]],
        *([cell.text for cell in row] for row in table.rows),
    ]
    cells = [[re.sub(r"([\\`*_\[\]<>|~$&])", r"\\\1", cell) for cell in line] for line in lines]
    return f"{table.caption}:\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _with_interval(rows: Sequence[Row], write: Callable[[Any], str], *keys: str) -> list[Row]:
    """The rows with `value ± interval` as one text under each of the keys."""

    def text(row: Row, key: str) -> str:
        half = row[f"{key}_ci"]
        return write(row[key]) + ("" if half is None else f" ± {write(half)}")

    return [row | {key: text(row, key) for key in keys} for row in rows]


def result_table(rows: Sequence[Row]) -> Table:
    shown = _with_interval(_with_interval(rows, number, "aggregate"), percent, "kept_quality")
    return simple_table(
        "What each variant ended with; ± is the 95 % confidence interval over seeds",
        shown,
        {
            "variant": ("variant", one_line),
            "runs": ("seeds", str),
            "layers": ("layers", _round),
            "removed_layers": ("layers removed, in order", lambda text: one_line(text, 60)),
            "aggregate": ("aggregate", str),
            "kept_quality": ("% kept", str),
            "scoring_seconds": ("scoring", duration),
            "layer_tokens": ("tokens × layers, scoring", count),
            "training_seconds": ("training", duration),
            "training_tokens": ("tokens trained on", count),
        },
    )


def depth_table(rows: Sequence[Row]) -> Table:
    shown = _with_interval(_with_interval(rows, number, "aggregate"), percent, "kept_quality")
    shown = [row | {"removed": f"{row['removed']}{', trained' if row['last_pass'] else ''}"} for row in shown]
    return simple_table(
        "Each variant at each depth; ± is the 95 % confidence interval over seeds",
        shown,
        {
            "variant": ("variant", one_line),
            "removed": ("layers removed", str),
            "layers": ("layers", _round),
            "parameters": ("parameters", count),
            "runs": ("seeds", str),
            "aggregate": ("aggregate", str),
            "kept_quality": ("% kept", str),
        },
    )


def ranking_table(rows: Sequence[Row]) -> Table:
    return simple_table(
        "How each task alone, and random subsets, rank the layers, against all tasks together",
        rows,
        {
            "ranking": ("ranking by", one_line),
            "subsets": ("subsets", str),
            "tau": ("Kendall's tau", number),
            "first_picks": ("first picks", str),
            "same_first": ("% with the same first pick", percent),
            "shared_firsts": ("% of the first three shared", percent),
        },
    )


def tau_table(rows: Sequence[Row]) -> Table:
    columns: Any = {name: (one_line(name, 40), number) for name in rows[0]} | {"ranking": ("", one_line)}
    return simple_table("Kendall's tau of each two rankings", rows, columns)


def layer_table(rows: Sequence[Row]) -> Table:
    shown = _with_interval(rows, percent, "lost")
    return simple_table(
        "What the first scoring says of each layer; ± is the 95 % interval over seeds",
        shown,
        {
            "variant": ("variant", one_line),
            "layer": ("layer", str),
            "relative_depth": ("relative depth", number),
            "metric": ("metric", one_line),
            "lost": ("lost when skipped, % of the teacher's aggregate", str),
            "removed_in": ("removed in, % of runs", percent),
            "round": ("in round", _round),
        },
    )


def _round(value: float | None) -> str:
    return "–" if value is None else f"{value:g}" if value == round(value) else f"{value:.1f}"


TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    "results": result_table,
    "depths": depth_table,
    "rankings": ranking_table,
    "tau": tau_table,
    "layers": layer_table,
}
