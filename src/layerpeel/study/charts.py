"""The figures of studies, in the style of the report's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import SymmetricalLogLocator

from layerpeel.processes.text import number, one_line
from layerpeel.report.figures import Line, draw_quality
from layerpeel.report.style import COLOURS, INK, MARKERS, canvas, plain_numbers
from layerpeel.study.rows import LayerRow, ResultRow, TauRow, VariantDepthRow

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


def draw_depths(rows: Sequence[VariantDepthRow], methods: Mapping[str, str]) -> Figure:
    """Quality against layers removed, a line a variant.

    Args:
        methods: what the legend says of each variant.
    """
    lines = []
    for variant, method in methods.items():
        depths = [row for row in rows if row.variant == variant]
        lines.append(
            Line(
                name=variant,
                method=method,
                removed=[row.removed for row in depths],
                aggregate=[row.aggregate for row in depths],
                stderr=[row.aggregate_ci or 0.0 for row in depths],
                parameters=[row.parameters for row in depths],
            )
        )
    return draw_quality(lines, LABEL)


def draw_results(rows: Sequence[ResultRow], teacher: float) -> Figure:
    """The final quality of each variant, with the teacher's."""
    with canvas(7.5, 1.6 + 0.34 * len(rows)) as (figure, axes):
        for height, (row, colour) in enumerate(zip(rows, cycle(COLOURS), strict=False)):
            axes.errorbar(row.aggregate, height, xerr=row.aggregate_ci or 0.0, color=colour, marker="o")
        axes.axvline(teacher, color=INK, linewidth=0.8, linestyle=":", label="teacher")
        axes.set_yticks(range(len(rows)), [one_line(row.variant, 44) for row in rows])
        axes.set(xlabel=LABEL.replace("\n", " "), ylim=(len(rows) - 0.5, -0.5))
        axes.grid(axis="x")
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def draw_sweep(rows: Sequence[ResultRow], field: str, teacher: float) -> Figure:
    """Quality against the values of one field; a logarithmic axis where they span more than a factor of 50."""
    values = [row.values[field] for row in rows]
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    with canvas() as (figure, axes):
        positions = values if numeric else [str(value) for value in values]
        errors = [row.aggregate_ci or 0.0 for row in rows]
        axes.errorbar(positions, [row.aggregate for row in rows], yerr=errors, color=COLOURS[0], marker="o")
        axes.axhline(teacher, color=INK, linewidth=0.8, linestyle=":", label="teacher")
        if numeric and min(values) > 0 and max(values) > 50 * min(values):
            axes.set_xscale("log")
            plain_numbers(axes.xaxis)
        axes.set(xlabel=one_line(field, 60), ylabel=LABEL)
        axes.grid()
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def draw_costs(rows: Sequence[ResultRow], teacher: float) -> Figure:
    """Quality against the time of scoring, and against the tokens that went through a layer; a point a variant."""
    with canvas(9.5, 4.0 + 0.2 * len(rows), ncols=2, sharey=True) as (figure, panels):
        for axes, label, costs in zip(
            panels,
            ("seconds of scoring", "tokens through a layer in scoring"),
            ([row.scoring_seconds for row in rows], [row.layer_tokens for row in rows]),
            strict=True,
        ):
            for row, cost, colour, marker in zip(rows, costs, cycle(COLOURS), cycle(MARKERS), strict=False):
                axes.errorbar(
                    cost,
                    row.aggregate,
                    yerr=row.aggregate_ci or 0.0,
                    color=colour,
                    marker=marker,
                    linestyle="none",
                    label=one_line(row.variant, 44),
                )
            axes.axhline(teacher, color=INK, linewidth=0.8, linestyle=":", label="teacher")
            if min(costs) > 0:
                axes.set_xscale("log")
                plain_numbers(axes.xaxis)
            axes.set_xlabel(label)
            axes.grid()
        panels[0].set_ylabel(LABEL)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


def draw_layers(rows: Sequence[LayerRow]) -> Figure:
    """Importance against relative depth, a line a variant; layers that most of its runs removed are ringed."""
    variants = dict.fromkeys(row.variant for row in rows)
    with canvas(7.0, 4.2) as (figure, axes):
        axes.set_yscale("symlog", linthresh=1.0)
        axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1.0, subs=(1, 2, 5)))
        plain_numbers(axes.yaxis)
        for variant, colour, marker in zip(variants, cycle(COLOURS), cycle(MARKERS), strict=False):
            layers = [row for row in rows if row.variant == variant]
            axes.errorbar(
                [row.relative_depth for row in layers],
                [100 * row.lost for row in layers],
                yerr=[100 * (row.lost_ci or 0.0) for row in layers],
                color=colour,
                marker=marker,
                markersize=4,
                label=f"{one_line(variant, 30)} ({one_line(layers[0].metric, 30)})",
            )
            removed = [row for row in layers if row.removed_in > 0.5]
            axes.scatter(
                [row.relative_depth for row in removed],
                [100 * row.lost for row in removed],
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


def draw_taus(rows: Sequence[TauRow]) -> Figure:
    """Kendall's tau of each two rankings, as a matrix."""
    taus = [[np.nan if tau is None else tau for tau in row.taus.values()] for row in rows]
    grid = np.array(taus, dtype=float)
    size = 2.2 + 0.52 * len(rows)
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
        labels = [one_line(row.ranking, 24) for row in rows]
        axes.set_xticks(range(len(rows)), labels, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(rows)), labels)
        axes.spines[:].set_visible(False)
        figure.colorbar(mesh, ax=axes, shrink=0.8).set_label("Kendall's tau of the two rankings")
    return figure
