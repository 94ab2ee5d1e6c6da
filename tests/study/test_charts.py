"""The figures of studies: axes in plain numbers, names whole, no two lines alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from layerpeel.report.style import save
from layerpeel.study import charts


def rows(count: int, **fields: Any) -> list[dict[str, Any]]:
    """A row a variant; a field that is a function is called with the row's number."""
    base = {"aggregate": 0.5, "aggregate_ci": 0.1} | fields
    return [
        {"variant": f"variant {i}"} | {key: value(i) if callable(value) else value for key, value in base.items()}
        for i in range(count)
    ]


FIGURES = {
    "costs": (
        lambda: charts.draw_costs(
            rows(4, scoring_seconds=lambda i: 0.2 * 9**i, layer_tokens=lambda i: 5e4 * 9**i), 0.6
        ),
        ["1", "10", "100", "100 k", "1.00 M", "10.0 M"],
    ),
    "sweep": (
        lambda: charts.draw_sweep(rows(6, weight=lambda i: 0.01 * 10**i), "weight", 0.6),
        ["0.01", "0.1", "1", "10", "100", "1000"],
    ),
    "layers": (
        lambda: charts.draw_layers(
            rows(
                5,
                variant="a",
                metric="m",
                relative_depth=lambda i: i / 4,
                lost_ci=None,
                removed_in=0.0,
                lost=lambda i: [-0.02, 0, 0.01, 0.1, 0.5][i],
            )
        ),
        ["−2", "−1", "0", "1", "10", "50"],
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_logarithmic_axes_are_labelled_in_plain_numbers(name: str, tmp_path: Path) -> None:
    draw, labels = FIGURES[name]
    svg = save(draw(), tmp_path / name)
    assert "mathdefault" not in svg and "10^" not in svg
    assert all(f">{label}</text>" in svg for label in labels)


def test_lines_of_many_variants_differ_and_are_named_whole() -> None:
    names = [f"single pass block influence, untrained {i}" for i in range(12)]
    made = [
        row | {"variant": name, "removed": removed, "parameters": 10 - removed}
        for name in names
        for removed in range(2)
        for row in rows(1)
    ]
    figure: Figure = charts.draw_depths(made, dict.fromkeys(names, "1 seed"))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"{name} (1 seed)" for name in names]
    looks = [
        (c.lines[0].get_color(), c.lines[0].get_marker(), c.lines[0].get_linestyle()) for c in figure.axes[0].containers
    ]
    assert len(set(looks)) == 12 and len({(colour, style) for colour, _, style in looks}) == 12
