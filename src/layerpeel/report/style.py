"""How figures look."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from layerpeel.processes.text import count

INK, PAPER = "#1f2937", "#ffffff"  # the page puts its own in their place
COLOURS = ("#2f7de1", "#d9651a", "#1a9a6c", "#b4509e", "#94851c", "#7a78d6", "#6f7a87")  # seen on light and dark
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # one more than colours, so that pairs repeat late


STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a $ in a name is a $
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.labelcolor": INK,
    "legend.frameon": False,
    "hatch.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "grid.linewidth": 0.6,
    "font.size": 11,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "legend.fontsize": "small",
    "errorbar.capsize": 2.5,
}


@contextmanager
def canvas(width: float = 6.2, height: float = 3.9, **layout: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure and its axes, in our style."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
        yield figure, figure.subplots(**layout)


def save(figure: Figure, path: Path) -> str:
    """Writes PATH.png and PATH.svg; gives the SVG to be put into a page."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": path.name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the page's fonts have more
        figure.savefig(path.with_suffix(".png"), dpi=150)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    return inline(path.with_suffix(".svg").read_text(encoding="utf-8"), path.name)


def inline(svg: str, name: str) -> str:
    """An SVG of matplotlib's as part of a page: it scales, takes the page's colours, and shares no id with another."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    width = float(re.search(r'width="([\d.]+)pt"', svg)[1])  # type: ignore[index]
    bounds = f'style="width: {1.45 * width:.0f}px; min-width: {0.79 * width:.0f}px" aria-hidden="true"'
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf"\1 {bounds}", svg, count=1)  # text stays of one, legible size
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace(INK, "currentColor").replace(f"fill: {PAPER}", "fill: none")


def plain_numbers(axis: Axis) -> None:
    """Labels a logarithmic axis in plain numbers: its own labels are formulas, which our style does not set."""
    axis.set_major_formatter(
        lambda value, _: count(value) if abs(value) >= 10_000 else f"{value:g}".replace("-", "\N{MINUS SIGN}")
    )
    axis.set_minor_formatter(NullFormatter())
