"""The style of figures, and how they become files and inline SVG."""

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

INK, PAPER = "#1f2937", "#ffffff"  # replaced by the page's colours in inline SVG
COLOURS = ("#2f7de1", "#d9651a", "#1a9a6c", "#b4509e", "#94851c", "#7a78d6", "#6f7a87")  # legible on light and dark
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # one more than colours, so that few pairs repeat


STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # a $ in a name is no formula
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
    """A figure and its axes in this style; `layout` goes to `Figure.subplots`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor=PAPER)
        yield figure, figure.subplots(**layout)


def save(figure: Figure, path: Path) -> str:
    """Writes PATH.png and PATH.svg; returns the SVG as `inline` makes it."""
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": path.name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the page's fonts have more
        figure.savefig(path.with_suffix(".png"), dpi=150)
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    return inline(path.with_suffix(".svg").read_text(encoding="utf-8"), path.name)


def inline(svg: str, name: str) -> str:
    """Turns an SVG file of matplotlib into an element of a page: scalable, in the page's colours, with unique ids.

    Args:
        name: a prefix of its ids.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    width = float(re.search(r'width="([\d.]+)pt"', svg)[1])  # type: ignore[index]
    bounds = f'style="width: {1.45 * width:.0f}px; min-width: {0.79 * width:.0f}px" aria-hidden="true"'
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf"\1 {bounds}", svg, count=1)  # keeps the text legible
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    return svg.replace(INK, "currentColor").replace(f"fill: {PAPER}", "fill: none")


def plain_numbers(axis: Axis) -> None:
    """Labels a logarithmic axis with plain numbers; the default labels are formulas, which this style shows as text."""
    axis.set_major_formatter(
        lambda value, _: count(value) if abs(value) >= 10_000 else f"{value:g}".replace("-", "\N{MINUS SIGN}")
    )
    axis.set_minor_formatter(NullFormatter())
