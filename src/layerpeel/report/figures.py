"""The figures of reports, drawn by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from layerpeel.importance.scores import LayerScores
from layerpeel.processes.text import count, one_line
from layerpeel.report.rows import CostRow, ImportanceRow
from layerpeel.report.style import COLOURS, INK, MARKERS, canvas, plain_numbers
from layerpeel.training.result import NO_LOSS

ROUNDS = LinearSegmentedColormap.from_list("rounds", ["#2f7de1", "#9b6bd0", "#d9651a"])


@dataclass(frozen=True)
class Line:
    """A run in the chart of quality.

    Attributes:
        name: of the run.
        method: a short description of its config.
        removed: number of layers removed, at each depth.
        aggregate, stderr: the aggregate and its error, at each depth.
        parameters: number of parameters, at each depth.
    """

    name: str
    method: str
    removed: Sequence[int]
    aggregate: Sequence[float]
    stderr: Sequence[float]
    parameters: Sequence[float]


def draw_quality(lines: Sequence[Line], ylabel: str, floor: float | None = None) -> Figure:
    """Quality against layers removed, a line a run, with the first run's parameters above (the paper's figure)."""
    with canvas(height=3.7 + 0.22 * len(lines)) as (figure, axes):
        dashes = [index // len(COLOURS) % 2 for index in range(len(lines))]  # tells repeated colours apart
        for line, colour, marker, dashed in zip(lines, cycle(COLOURS), cycle(MARKERS), dashes, strict=False):
            axes.errorbar(
                line.removed,
                line.aggregate,
                yerr=line.stderr,
                color=colour,
                marker=marker,
                markersize=4.5,
                linestyle="--" if dashed else "-",
                linewidth=1.6,
                elinewidth=0.9,
                label=f"{one_line(line.name, 44)} ({one_line(line.method, 44)})",
            )
        if floor is not None:
            axes.axhline(floor, color=INK, linewidth=0.8, linestyle=":", label="quality floor")
        first = lines[0]
        if len(lines) > 1 or floor is not None:
            figure.legend(loc="outside lower left")
        axes.set(xlabel="layers removed", ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid()
        above = axes.secondary_xaxis("top")
        parameters = dict(zip(first.removed, first.parameters, strict=True))
        shown = list(parameters)[:: -(-len(parameters) // 9)]
        above.set_xticks(shown, [count(parameters[removed]) for removed in shown])
        above.set_xlabel("parameters" if len(lines) == 1 else f"parameters of {one_line(first.name, 40)}")
    return figure


def draw_tasks(shares: Mapping[str, Sequence[float | None]]) -> Figure:
    """Each task's quality as a share of the teacher's, against layers removed."""
    with canvas() as (figure, axes):
        for (name, values), colour, marker in zip(shares.items(), cycle(COLOURS), cycle(MARKERS), strict=False):
            percents = [np.nan if value is None else 100 * value for value in values]
            axes.plot(percents, color=colour, marker=marker, markersize=4, linewidth=1.4, label=one_line(name, 24))
        axes.axhline(100, color=INK, linewidth=0.8)
        axes.set(xlabel="layers removed", ylabel="% of the teacher's score")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid()
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
    return figure


def draw_heat(rows: Sequence[ImportanceRow], removed: Sequence[int], total: int, metric: str) -> Figure:
    """Importance by round and teacher layer.

    Args:
        rows: of one metric.
        removed: the layer that each round removed.
        total: number of the teacher's layers.
        metric: the metric's name.
    """
    grid = np.full((len(removed), total), np.nan)
    for row in rows:
        grid[row.round - 1, row.layer] = row.importance
    height = min(9.0, 1.7 + 0.3 * len(removed))
    with canvas(max(6.0, min(12.0, 2.0 + 0.33 * total)), height) as (figure, axes):
        scored = grid[np.isfinite(grid)]
        low, high = (float(scored.min()), float(np.quantile(scored, 0.95))) if scored.size else (0.0, 1.0)
        mesh = axes.pcolormesh(
            np.arange(total + 1) - 0.5,
            np.arange(len(removed) + 1) + 0.5,
            np.ma.masked_invalid(grid),
            cmap="viridis",
            vmin=low,
            vmax=max(high, low + 1e-12),
            edgecolors=INK,
            linewidth=0.3,
        )
        _mark_removed(axes, removed)
        clipped = bool(scored.size) and high < scored.max()
        figure.colorbar(mesh, ax=axes, extend="max" if clipped else "neither", pad=0.02).set_label(
            f"{one_line(metric, 40)}:\nlost when skipped", labelpad=10
        )
        axes.set(xlabel="teacher layer", ylabel="round", xlim=(-0.5, total - 0.5), ylim=(len(removed) + 0.5, 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=24, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=24, integer=True))
    return figure


def _mark_removed(axes: Any, removed: Sequence[int]) -> None:
    """Writes × on the layer that a round removed, and – on those that were removed before."""
    for number, layer in enumerate(removed, start=1):
        axes.text(
            layer,
            number,
            "×",
            ha="center",
            va="center",
            color="#fefefe",
            fontweight="bold",
            bbox={"boxstyle": "circle,pad=0.12", "facecolor": "#b91c1c", "edgecolor": "none"},
        )
        for gone in removed[: number - 1]:
            axes.text(gone, number, "–", ha="center", va="center", color=INK, alpha=0.6)


def draw_training(curves: Mapping[int, Sequence[Mapping[str, float]]]) -> Figure:
    """The loss and its parts against tokens, a line a round."""
    names = {name for curve in curves.values() for point in curve for name in point}
    parts = sorted(names - {"loss", *NO_LOSS})
    panels = ["loss", *parts][:4]
    with canvas(3.0 * len(panels) + 1.6, 3.2, ncols=len(panels), squeeze=False) as (figure, axes):
        for part, panel in zip(panels, axes[0], strict=True):
            _draw_loss(panel, part, curves)
        handles, labels = axes[0, -1].get_legend_handles_labels()
        step = -(-len(curves) // 8)
        figure.legend(handles[::step], labels[::step], loc="outside right upper")
    return figure


def _draw_loss(axes: Any, part: str, curves: Mapping[int, Sequence[Mapping[str, float]]]) -> None:
    """One part of the loss against tokens; a logarithmic axis where all values are positive."""
    for number, curve in curves.items():
        tokens, values = _smooth(curve, part)
        colour = ROUNDS((number - 1) / max(1, max(curves) - 1))
        axes.plot(tokens, values, color=colour, linewidth=1.2, label=f"round {number}")
    if min((float(value) for line in axes.get_lines() for value in line.get_ydata()), default=0) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        plain_numbers(axes.yaxis)
    axes.set(title=one_line(part, 24), xlabel="tokens")
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.xaxis.set_major_formatter(_tick)
    axes.grid()


def _tick(value: float, _: int | None = None) -> str:
    """A count without trailing zeros: 1.5 k for 1.50 k."""
    digits, *unit = count(value).split(" ")
    return " ".join([digits.rstrip("0").rstrip(".") if "." in digits else digits, *unit])


def _smooth(curve: Sequence[Mapping[str, float]], key: str, most: int = 300) -> tuple[list[float], list[float]]:
    """Tokens and values of a curve, averaged over neighbours to at most `most` points; not finite ones are left out."""
    points = [(point["tokens"], point[key]) for point in curve if math.isfinite(point.get(key, math.nan))]
    groups = np.array_split(np.array(points, dtype=float).reshape(-1, 2), max(1, min(most, len(points))))
    means = [group.mean(axis=0) for group in groups if len(group)]
    return [float(mean[0]) for mean in means], [float(mean[1]) for mean in means]


@dataclass(frozen=True)
class SpeedLine:
    """A runtime in the chart of speed.

    Attributes:
        name: of the runtime, and the kind of its files.
        removed: number of layers removed, at each depth.
        generation, prompt: times the teacher's speed, at each depth; empty where it was not timed.
    """

    name: str
    removed: Sequence[int]
    generation: Sequence[float]
    prompt: Sequence[float]


def draw_speed(lines: Sequence[SpeedLine], total: int) -> Figure:
    """Measured speed against layers removed, as a multiple of the teacher's, beside what layers alone would give.

    Args:
        total: number of the teacher's layers.
    """
    deepest = max(max(line.removed) for line in lines)
    with canvas(9.6, 3.7 + 0.22 * len(lines), ncols=2, sharey=True) as (figure, panels):
        for axes, part in zip(panels, ("generation", "prompt"), strict=True):
            for line, colour, marker in zip(lines, cycle(COLOURS), cycle(MARKERS), strict=False):
                values = getattr(line, part)
                label = one_line(line.name, 44) if part == "generation" else None
                if values:
                    axes.plot(
                        line.removed,
                        values,
                        color=colour,
                        marker=marker,
                        markersize=4.5,
                        linewidth=1.4,
                        label=label,
                    )
            depths = np.linspace(0, deepest, 50)
            label = "by layers alone" if part == "generation" else None
            axes.plot(depths, total / (total - depths), color=INK, linewidth=0.9, linestyle=":", label=label)
            axes.set(title=part, xlabel="layers removed")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.grid()
        panels[0].set_ylabel("times the teacher's speed")
        figure.legend(loc="outside lower left", ncols=2)
    return figure


def draw_costs(rows: Sequence[CostRow]) -> Figure:
    """Seconds of scoring, repair and training, above what each round lost."""
    rounds = [row.round for row in rows]
    with canvas(height=4.0, nrows=2, sharex=True) as (figure, (top, bottom)):
        base = np.zeros(len(rows))
        for label, colour, seconds in (
            ("scoring", COLOURS[0], [row.scoring_seconds for row in rows]),
            ("healing", COLOURS[2], [row.healing_seconds for row in rows]),
            ("repair", COLOURS[4], [row.repair_seconds for row in rows]),
            ("training", COLOURS[1], [row.training_seconds for row in rows]),
        ):
            if any(seconds):
                top.bar(rounds, seconds, bottom=base, color=colour, width=0.7, label=label)
            base += seconds
        top.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0))
        bottom.bar(rounds, [row.aggregate_lost for row in rows], color=COLOURS[3], width=0.7)
        bottom.axhline(0, color=INK, linewidth=0.8)
        top.set_ylabel("seconds")
        bottom.set(xlabel="round", ylabel="aggregate lost")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (top, bottom):
            axes.grid(axis="y")
    return figure


def draw_importance(scores: LayerScores, path: Path) -> None:
    """Writes a bar chart of each layer's importance, with its standard error where there is one.

    Args:
        path: its suffix selects the format (.png, .svg, .pdf).
    """
    layers = sorted(scores.importance)
    values = [scores.importance[layer] for layer in layers]
    errors = [scores.stderr.get(layer, 0.0) for layer in layers] if scores.stderr else None
    first = scores.ranked()[0]
    colours = [
        COLOURS[1] if layer == first else "#94a3b8" if layer in scores.dropped else COLOURS[0] for layer in layers
    ]
    with canvas(max(5.0, 0.32 * len(layers) + 1.5), 3.6) as (figure, axes):
        axes.bar([str(layer) for layer in layers], values, yerr=errors, color=colours, ecolor=INK, capsize=2)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set(xlabel="layer", ylabel=f"{one_line(scores.metric, 40)}: lost when skipped")
        axes.set_title(f"Layer {first} would go first")
        figure.savefig(path, dpi=160)
