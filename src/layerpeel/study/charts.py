"""The figures of studies, in the style of the report's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator

from layerpeel.processes.text import number, one_line
from layerpeel.report.figures import Line, draw_quality
from layerpeel.report.style import COLOURS, INK, MARKERS, canvas, plain_numbers

Row = Mapping[str, Any]
LABEL = "aggregate, mean\nand 95 % interval over seeds"
BARS = "bars are 95 % confidence intervals over seeds (Student's t)"
NOTES = {
    "depths": f"Aggregate of the tasks against layers removed; {BARS}; a step straight up or down at the end is "
    "training after the last removal.",
    "results": f"Aggregate of the tasks at the end of each variant; {BARS}.",
    "sweep": f"Aggregate of the tasks at the end, against the field that is varied; {BARS}.",
    "costs": "Aggregate of the tasks at the end, against what scoring cost in time and in tokens that went through a "
    f"layer; {BARS}.",
    "rankings": "Kendall's tau of the rankings of layers by each task alone, and by all together: 1 is the same order, "
    "0 none in common.",
    "layers": "What is lost when a layer is skipped, by the first scoring, against relative depth; ringed layers were "
    "removed by most of a variant's runs. The axis is linear up to 1 % and logarithmic beyond.",
}


def draw_depths(rows: Sequence[Row], methods: Mapping[str, str]) -> Figure:
    """Quality against layers removed, a line a variant."""
    lines = []
    for variant, method in methods.items():
        own = [row for row in rows if row["variant"] == variant]
        values = ([row[key] for row in own] for key in ("removed", "aggregate", "aggregate_ci", "parameters"))
        removed, aggregate, errors, parameters = values
        lines.append(Line(variant, method, removed, aggregate, [error or 0.0 for error in errors], parameters))
    return draw_quality(lines, LABEL)


def draw_results(rows: Sequence[Row], teacher: float) -> Figure:
    """A point a variant, beside the teacher."""
    with canvas(7.5, 1.6 + 0.34 * len(rows)) as (figure, axes):
        for place, (row, colour) in enumerate(zip(rows, cycle(COLOURS), strict=False)):
            axes.errorbar(row["aggregate"], place, xerr=row["aggregate_ci"] or 0.0, color=colour, marker="o")
        axes.axvline(teacher, color=INK, linewidth=0.8, linestyle=":", label="teacher")
        axes.set_yticks(range(len(rows)), [one_line(row["variant"], 44) for row in rows])
        axes.set(xlabel=LABEL.replace("\n", " "), ylim=(len(rows) - 0.5, -0.5))
        axes.grid(axis="x")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def draw_sweep(rows: Sequence[Row], field: str, teacher: float) -> Figure:
    """Quality against the values of one field; a logarithmic axis where they span more than a factor of 50."""
    values = [row[field] for row in rows]
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    with canvas() as (figure, axes):
        places = values if numeric else [str(value) for value in values]
        errors = [row["aggregate_ci"] or 0.0 for row in rows]
        axes.errorbar(places, [row["aggregate"] for row in rows], yerr=errors, color=COLOURS[0], marker="o")
        axes.axhline(teacher, color=INK, linewidth=0.8, linestyle=":", label="teacher")
        if numeric and min(values) > 0 and max(values) > 50 * min(values):
            axes.set_xscale("log")
            plain_numbers(axes.xaxis)
        axes.set(xlabel=one_line(field, 60), ylabel=LABEL)
        axes.grid()
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def draw_costs(rows: Sequence[Row], teacher: float) -> Figure:
    """Quality against the time and the layer calls of scoring, a point a variant."""
    with canvas(9.5, 4.0 + 0.2 * len(rows), ncols=2, sharey=True) as (figure, panels):
        for axes, key, label in zip(
            panels,
            ("scoring_seconds", "layer_tokens"),
            ("seconds of scoring", "tokens through a layer in scoring"),
            strict=True,
        ):
            for row, colour, marker in zip(rows, cycle(COLOURS), cycle(MARKERS), strict=False):
                axes.errorbar(
                    row[key],
                    row["aggregate"],
                    yerr=row["aggregate_ci"] or 0.0,
                    color=colour,
                    marker=marker,
                    linestyle="none",
                    label=one_line(row["variant"], 44),
                )
            axes.axhline(teacher, color=INK, linewidth=0.8, linestyle=":", label="teacher")
            if min(row[key] for row in rows) > 0:
                axes.set_xscale("log")
                plain_numbers(axes.xaxis)
            axes.set_xlabel(label)
            axes.grid()
        panels[0].set_ylabel(LABEL)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def draw_layers(rows: Sequence[Row]) -> Figure:
    """Importance against relative depth, a line a variant; layers that most of its runs removed are ringed."""
    with canvas(7.0, 4.2) as (figure, axes):
        axes.set_yscale("symlog", linthresh=1.0)
        axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1.0, subs=(1, 2, 5)))
        plain_numbers(axes.yaxis)
        for variant, colour, marker in zip(
            dict.fromkeys(row["variant"] for row in rows), cycle(COLOURS), cycle(MARKERS), strict=False
        ):
            own = [row for row in rows if row["variant"] == variant]
            depths, lost = [row["relative_depth"] for row in own], [100 * row["lost"] for row in own]
            errors = [100 * (row["lost_ci"] or 0.0) for row in own]
            axes.errorbar(
                depths,
                lost,
                yerr=errors,
                color=colour,
                marker=marker,
                markersize=4,
                label=f"{one_line(variant, 30)} ({one_line(own[0]['metric'], 30)})",
            )
            gone = [place for place, row in enumerate(own) if row["removed_in"] > 0.5]
            axes.scatter(
                [depths[i] for i in gone],
                [lost[i] for i in gone],
                s=110,
                facecolors="none",
                edgecolors=colour,
                label=f"removed from {one_line(variant, 30)}",
            )
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set(
            xlabel="relative depth (0 first layer, 1 last)", ylabel="lost when skipped,\n% of the teacher's aggregate"
        )
        axes.grid()
        figure.legend(loc="outside lower left", ncols=2)
    return figure


def draw_matrix(names: Sequence[str], matrix: Sequence[Sequence[float | None]]) -> Figure:
    """Kendall's tau of each two rankings."""
    grid = np.array([[np.nan if value is None else value for value in row] for row in matrix], dtype=float)
    size = 2.2 + 0.52 * len(names)
    with canvas(size + 0.9, size) as (figure, axes):
        mesh = axes.imshow(grid, cmap="RdBu", vmin=-1, vmax=1)
        for (row, column), value in np.ndenumerate(grid):
            shown = "–" if np.isnan(value) else number(value, 2)
            axes.text(
                column,
                row,
                shown,
                ha="center",
                va="center",
                fontsize=8,
                color="#ffffff" if abs(value) > 0.6 else "#111827",
            )
        labels = [one_line(name, 24) for name in names]
        axes.set_xticks(range(len(names)), labels, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), labels)
        axes.spines[:].set_visible(False)
        figure.colorbar(mesh, ax=axes, shrink=0.8).set_label("Kendall's tau of the two rankings")
    return figure
