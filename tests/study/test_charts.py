"""The figures of studies: axes in plain numbers, names whole, no two lines alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from layerpeel.report.style import save
from layerpeel.study import charts
from layerpeel.study.rows import LayerRow, ResultRow, VariantDepthRow

RESULT = ResultRow(
    variant="",
    values={},
    runs=1,
    removed=1,
    layers=5,
    parameters=10,
    aggregate=0.5,
    aggregate_ci=0.1,
    kept_quality=1.0,
    kept_quality_ci=None,
    removed_layers="1",
    scoring_seconds=1.0,
    layer_tokens=1,
    training_seconds=0.0,
    training_tokens=0,
)
LAYER = LayerRow("a", layer=0, relative_depth=0.0, metric="m", lost=0.0, lost_ci=None, removed_in=0.0, round=None)

FIGURES = {
    "costs": (
        lambda: charts.draw_costs(
            [
                replace(RESULT, variant=f"variant {i}", scoring_seconds=0.2 * 9**i, layer_tokens=5e4 * 9**i)
                for i in range(4)
            ],
            0.6,
        ),
        ["1", "10", "100", "100 k", "1.00 M", "10.0 M"],
    ),
    "sweep": (
        lambda: charts.draw_sweep(
            [replace(RESULT, variant=f"variant {i}", values={"weight": 0.01 * 10**i}) for i in range(6)], "weight", 0.6
        ),
        ["0.01", "0.1", "1", "10", "100", "1000"],
    ),
    "layers": (
        lambda: charts.draw_layers(
            [replace(LAYER, relative_depth=i / 4, lost=lost) for i, lost in enumerate([-0.02, 0, 0.01, 0.1, 0.5])]
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
    rows = [
        VariantDepthRow(name, removed, False, 1, 10 - removed, 10 - removed, 0.5, 0.1, 1.0, None)
        for name in names
        for removed in range(2)
    ]
    figure: Figure = charts.draw_depths(rows, dict.fromkeys(names, "1 seed"))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"{name} (1 seed)" for name in names]
    looks = [
        (c.lines[0].get_color(), c.lines[0].get_marker(), c.lines[0].get_linestyle()) for c in figure.axes[0].containers
    ]
    assert len(set(looks)) == 12 and len({(colour, style) for colour, _, style in looks}) == 12
