"""The plots of the report as SVG, text kept as text, so that the page needs no network and prints sharp."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from minifoundation.report.runs import Run
from minifoundation.wording import short_count

OURS, GRID, INK, MUTED = "#1d4ed8", "#e2e8f0", "#0f172a", "#64748b"
OTHERS = ("#d97706", "#059669", "#9333ea", "#db2777", "#0891b2", "#475569")
MARKERS = "sD^vPX"
PHASES = ("#1d4ed8", "#d97706", "#059669", "#9333ea")
WIDTH = 4.6
"""Inches of a plot: one column of a phone, half of a page."""
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#94a3b8",
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Point:
    """A score in percent of one model on one benchmark."""

    model: str
    benchmark: str
    score: float
    same: bool
    """Whether it was measured as ours was."""
    stderr: float | None = None
    chance: float | None = None


def _svg(figure: Figure, name: str, alternative: str) -> str:
    """Return a figure as an ``svg`` element that scales with the page and says what it shows."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="(figure|axes|patch|line2d|xtick|ytick|text|matplotlib\.axis|PathCollection|LineCollection|legend)_\d+"', "", text)
    text = re.sub(
        r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", re.sub(r'height="[^"]*pt" |width="[^"]*pt" ', "", text, count=2)
    )
    return text.replace("<svg ", f'<svg role="img" aria-label="{alternative}" ', 1)


def curve(runs: Sequence[Run], column: str, title: str, unit: str, *, log: bool = False) -> str | None:
    """Return a column of the metrics over training tokens, a colour a run, spikes of the loss marked; None where no run has it."""
    series = []
    before = runs[0].before if runs else 0
    for run in runs:
        values = np.array(run.column(column))
        shown = ~np.isnan(values)
        if shown.any():
            series.append((run, (np.array(run.columns["tokens"]) + before)[shown], values[shown], shown))
        before += run.tokens
    if not series:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
        axes = figure.subplots()
        for colour, (run, tokens, values, shown) in zip(PHASES * len(series), series, strict=False):
            few = len(values) < 30
            axes.plot(tokens, values, color=colour, linewidth=1.4, marker="o" if few else None, markersize=3, label=run.folder.name)
            if column == "loss" and run.spikes:
                steps = np.isin(run.columns["step"], run.spikes)[shown]
                axes.plot(tokens[steps], values[steps], "x", color="#dc2626", markersize=5, label="spike")
        axes.set_title(title)
        axes.set_xlabel(tokens_of(runs[-1].imported_from))
        axes.set_ylabel(unit)
        axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
        if log:
            axes.set_yscale("log")
        if len(series) > 1:
            axes.legend()
        return _svg(figure, column, f"{title} over training tokens")


def against(points: Sequence[Point], ours: str) -> str | None:
    """Return our score and the others' on each benchmark: filled where measured the same way, hollow where not; chance as a tick."""
    benchmarks = list(dict.fromkeys(point.benchmark for point in points if point.model == ours))[::-1]
    if not benchmarks:
        return None
    place = {benchmark: number for number, benchmark in enumerate(benchmarks)}
    others = [model for model in dict.fromkeys(point.model for point in points) if model != ours]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.3 + 0.3 * len(benchmarks) + 0.2 * (len(others) // 2)), layout="constrained")
        axes = figure.subplots()
        for model, colour, marker in zip(
            [*others, ours], [*(OTHERS * 4)[: len(others)], OURS], [*(MARKERS * 4)[: len(others)], "o"], strict=True
        ):
            own = [point for point in points if point.model == model and point.benchmark in place]
            for same in (False, True):
                part = [point for point in own if point.same == same]
                axes.scatter(
                    [point.score for point in part],
                    [place[point.benchmark] for point in part],
                    s=52 if model == ours else 30,
                    marker=marker,
                    color=colour if same else "none",
                    edgecolor=colour,
                    linewidth=1.2,
                    zorder=3 + (model == ours),
                )
            axes.scatter([], [], marker=marker, s=36, color=colour, edgecolor=colour, label=model)
        for point in points:
            if point.model == ours:
                if point.stderr is not None:
                    axes.errorbar(point.score, place[point.benchmark], xerr=1.96 * point.stderr, color=OURS, linewidth=1.4, zorder=3)
                if point.chance:
                    axes.plot(point.chance, place[point.benchmark], "|", color=MUTED, markersize=13, markeredgewidth=1.6, zorder=2)
        axes.plot([], [], "|", color=MUTED, markersize=9, markeredgewidth=1.6, linestyle="none", label="chance")
        axes.set_yticks(range(len(benchmarks)), benchmarks)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.set_xlim(0, 100)
        axes.set_xlabel("score in percent; bar: 95% of its error")
        axes.grid(visible=False, axis="x")
        figure.legend(loc="outside upper left", ncols=2, handletextpad=0.3)
        return _svg(figure, "against", "our scores and those of other models by benchmark")


def tokens_of(imported_from: str | None) -> str:
    """Return what the tokens of a model are called: what imported weights had read before is not among them."""
    return "training tokens" if imported_from is None else "training tokens since the import"


def over_tokens(scores: dict[str, list[tuple[float, float, float | None]]], imported_from: str | None) -> str | None:
    """Return the score on each benchmark over training tokens, from (tokens, score, standard error); None with fewer than two points."""
    several = {name: points for name, points in scores.items() if len({tokens for tokens, _, _ in points}) > 1}
    shown = {name: sorted(points, key=lambda point: point[0]) for name, points in several.items()}
    if not shown:
        return None
    rows = math.ceil(len(shown) / 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.7 * rows + 0.3), layout="constrained")
        grid: Any = figure.subplots(rows, 2, squeeze=False, sharex=True)
        for axes in grid.flat[len(shown) :]:
            axes.set_visible(False)
        for axes, (name, points) in zip(grid.flat, shown.items(), strict=False):
            tokens, values = [point[0] for point in points], [point[1] for point in points]
            errors = [1.96 * (error or 0.0) for _, _, error in points]
            axes.errorbar(tokens, values, yerr=errors, color=OURS, marker="o", markersize=4, linewidth=1.4)
            axes.set_title(name)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
            axes.xaxis.set_minor_formatter(lambda value, _: "")
            if len(tokens) <= 4:
                axes.set_xticks(sorted(set(tokens)))
                axes.xaxis.set_minor_locator(NullLocator())
        figure.supxlabel(tokens_of(imported_from), fontsize=9, color=MUTED)
        return _svg(figure, "tokens", "score over training tokens by benchmark")
