"""The picture of an extended context: loss over position, and the needles found at each length and depth."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from minifoundation.report.plots import MUTED, OTHERS, OURS, STYLE

Curve = Sequence[tuple[float, float]]
"""Positions and nats a token."""

Grid = Mapping[tuple[int, float], float]
"""Share of the needles found, by length and depth."""


def picture(curves: Mapping[str, Curve], grids: Mapping[str, Mapping[str, Grid]], original: int) -> bytes:
    """Return a PNG.

    Args:
        curves: by the name of a model; drawn beside each other.
        grids: by the name of a task, then of a model.
        original: the length before any extension, marked in the curves.
    """
    models = list(dict.fromkeys(name for by_model in grids.values() for name in by_model))
    rows = (1 if curves else 0) + len(models)
    with matplotlib.rc_context({**STYLE, "figure.facecolor": "white", "axes.facecolor": "white"}):
        figure = Figure(figsize=(3.2 * max(2, len(grids)), 2.4 * max(1, rows)), layout="constrained")
        places = figure.add_gridspec(max(1, rows), max(1, len(grids)))
        if curves:
            axes = figure.add_subplot(places[0, :])
            for colour, (name, curve) in zip((MUTED, OURS, *OTHERS), curves.items(), strict=False):
                axes.plot([x for x, _ in curve], [y for _, y in curve], color=colour, marker=".", label=name)
            axes.axvline(original, color=MUTED, linestyle=":", linewidth=1)
            axes.set(xlabel="position in the document, tokens", ylabel="nats a token", title="loss by position, held-out documents")
            axes.legend()
        for column, (task, by_model) in enumerate(grids.items()):
            for row, name in enumerate(models, start=1 if curves else 0):
                _heat(figure.add_subplot(places[row, column]), by_model.get(name, {}), f"{task}, {name}: % found")
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=130)
    return data.getvalue()


def _heat(axes: matplotlib.axes.Axes, grid: Grid, title: str) -> None:
    lengths, depths = sorted({length for length, _ in grid}), sorted({depth for _, depth in grid})
    shares = np.array([[grid.get((length, depth), np.nan) for length in lengths] for depth in depths])
    if shares.size:
        axes.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=30)
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    for (y, x), share in np.ndenumerate(shares):
        readable = "white" if share < 0.2 or share > 0.8 else "black"  # the ends of the colours are dark
        axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=readable)
    axes.grid(False)
    axes.set(title=title, xlabel="length, tokens", ylabel="depth of the needle")
