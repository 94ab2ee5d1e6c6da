"""Figures, as files."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from layerpeel.importance import LayerScores


def draw_importance(scores: LayerScores, path: Path) -> None:
    """A bar for each layer: what is lost when it is skipped, with its standard error where there is one.

    Args:
        path: its suffix says the format (.png, .svg, .pdf).
    """
    layers = sorted(scores.importance)
    values = [scores.importance[layer] for layer in layers]
    errors = [scores.stderr.get(layer, 0.0) for layer in layers] if scores.stderr else None
    first = scores.ranked()[0]
    colours = ["#c2410c" if layer == first else "#94a3b8" if layer in scores.dropped else "#2563eb" for layer in layers]
    figure = Figure(figsize=(max(5.0, 0.32 * len(layers) + 1.5), 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.bar([str(layer) for layer in layers], values, yerr=errors, color=colours, ecolor="#0f172a", capsize=2)
    axes.axhline(0, color="#0f172a", linewidth=0.8)
    axes.set_xlabel("layer")
    axes.set_ylabel(f"{scores.metric}: lost when skipped")
    axes.set_title(f"Layer {first} would go first", loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)
