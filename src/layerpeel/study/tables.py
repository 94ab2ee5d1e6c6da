"""The tables of studies for people: cells for the page and the terminal, and Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from layerpeel.processes.text import count, duration, number, one_line, percent
from layerpeel.report.tables import Column, Table, column, make_table
from layerpeel.study.rows import LayerRow, RankingRow, ResultRow, StudyRows, TauRow, VariantDepthRow


def markdown(table: Table) -> str:
    """A table in Markdown, with the cells escaped."""
    lines = [
        table.heads,
        ["---", *["---:" for _ in table.heads[1:]]],
        *([cell.text for cell in row] for row in table.rows),
    ]
    cells = [[re.sub(r"([\\`*_\[\]<>|~$&])", r"\\\1", cell) for cell in line] for line in lines]
    return f"{table.caption}:\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in cells)


def tables_of(rows: StudyRows) -> dict[str, Table]:
    """By the names of the files."""
    tables = {"results": result_table(rows.results), "depths": depth_table(rows.depths)}
    if rows.rankings:
        tables |= {"rankings": ranking_table(rows.rankings), "tau": tau_table(rows.tau)}
    if rows.layers:
        tables["layers"] = layer_table(rows.layers)
    return tables


def _with_interval(value: float, half: float | None, write: Callable[[float], str]) -> str:
    return write(value) + ("" if half is None else f" ± {write(half)}")


def result_table(rows: Sequence[ResultRow]) -> Table:
    columns: list[Column[ResultRow]] = [
        column("variant", lambda row: row.variant, one_line),
        column("seeds", lambda row: row.runs),
        column("layers", lambda row: row.layers, _round),
        column("layers removed, in order", lambda row: row.removed_layers, lambda text: one_line(text, 60)),
        column("aggregate", lambda row: _with_interval(row.aggregate, row.aggregate_ci, number)),
        column("% kept", lambda row: _with_interval(row.kept_quality, row.kept_quality_ci, percent)),
        column("scoring", lambda row: row.scoring_seconds, duration),
        column("tokens × layers, scoring", lambda row: row.layer_tokens, count),
        column("training", lambda row: row.training_seconds, duration),
        column("tokens trained on", lambda row: row.training_tokens, count),
    ]
    return make_table("What each variant ended with; ± is the 95 % confidence interval over seeds", rows, columns)


def depth_table(rows: Sequence[VariantDepthRow]) -> Table:
    columns: list[Column[VariantDepthRow]] = [
        column("variant", lambda row: row.variant, one_line),
        column("layers removed", lambda row: f"{row.removed}{', trained' if row.last_pass else ''}"),
        column("layers", lambda row: row.layers, _round),
        column("parameters", lambda row: row.parameters, count),
        column("seeds", lambda row: row.runs),
        column("aggregate", lambda row: _with_interval(row.aggregate, row.aggregate_ci, number)),
        column("% kept", lambda row: _with_interval(row.kept_quality, row.kept_quality_ci, percent)),
    ]
    return make_table("Each variant at each depth; ± is the 95 % confidence interval over seeds", rows, columns)


def ranking_table(rows: Sequence[RankingRow]) -> Table:
    columns: list[Column[RankingRow]] = [
        column("ranking by", lambda row: row.ranking, one_line),
        column("subsets", lambda row: row.subsets),
        column("Kendall's tau", lambda row: row.tau, number),
        column("first picks", lambda row: row.first_picks),
        column("% with the same first pick", lambda row: row.same_first, percent),
        column("% of the first three shared", lambda row: row.shared_firsts, percent),
    ]
    caption = "How each task alone, and random subsets, rank the layers, against all tasks together"
    return make_table(caption, rows, columns)


def tau_table(rows: Sequence[TauRow]) -> Table:
    def tau_column(name: str) -> Column[TauRow]:
        return column(one_line(name, 40), lambda row: row.taus[name], number)

    columns = [column("", lambda row: row.ranking, one_line), *map(tau_column, rows[0].taus)]
    return make_table("Kendall's tau of each two rankings", rows, columns)


def layer_table(rows: Sequence[LayerRow]) -> Table:
    columns: list[Column[LayerRow]] = [
        column("variant", lambda row: row.variant, one_line),
        column("layer", lambda row: row.layer),
        column("relative depth", lambda row: row.relative_depth, number),
        column("metric", lambda row: row.metric, one_line),
        column(
            "lost when skipped, % of the teacher's aggregate",
            lambda row: _with_interval(row.lost, row.lost_ci, percent),
        ),
        column("removed in, % of runs", lambda row: row.removed_in, percent),
        column("in round", lambda row: row.round, _round),
    ]
    return make_table("What the first scoring says of each layer; ± is the 95 % interval over seeds", rows, columns)


def _round(value: float | None) -> str:
    return "–" if value is None else f"{value:g}" if value == round(value) else f"{value:.1f}"
