"""The tables of an evaluation in Markdown: ``report.md``, and what is printed at its end."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from minifoundation.evaluate.baselines import MARKS, Baselines
from minifoundation.evaluate.results import Outcome

FIGURES_BESIDE = 6
"""Columns of other models at most: the table stays readable in a terminal."""


def table(outcomes: Sequence[Outcome], baselines: Baselines) -> str:
    """Return the main table in Markdown: one line an outcome, shares in percent."""
    shown = columns(outcomes, baselines)
    header = ["benchmark", "protocol", "score", "± s.e.", "chance", "n", "truncated", *shown]
    lines = []
    for outcome in outcomes:
        chance = outcome.request.row.chance
        if outcome.not_run or outcome.score is None:
            lines.append([outcome.label, _not_run(outcome), "", "", _percent(chance), "", "", *[""] * len(shown)])
            continue
        also = "".join(f" ({name} {value:.4g})" for name, value in outcome.also.items())
        error = "" if outcome.stderr is None else f"{outcome.scale * outcome.stderr:.2f}"
        by_chance = _percent(chance) if outcome.is_share else ""
        cells = [outcome.label, outcome.protocol, f"{outcome.scale * outcome.score:.1f}{also}", error, by_chance]
        cells.append(f"{outcome.n} of {outcome.request.row.documents}" if outcome.is_sample else str(outcome.n))
        cells.append(f"{outcome.truncated} of {outcome.requests}" if outcome.truncated else "0")
        for model in shown:
            best = baselines.nearest(outcome, model)
            cells.append(f"{best.score:.1f} {best.mark(outcome)}" if best else "")
        lines.append(cells)
    legend = "; ".join(f"{mark} {meaning}" for mark, meaning in MARKS.items())
    cut = [outcome for outcome in outcomes if outcome.not_run and outcome.not_run not in _not_run(outcome)]
    parts = [_markdown(header, lines), *(f"{outcome.label} not run: {outcome.not_run}" for outcome in cut)]
    return "\n\n".join(parts + [f"Published figures beside ours: {legend}."] * bool(shown))


def columns(outcomes: Sequence[Outcome], baselines: Baselines) -> list[str]:
    """Return the models beside ours that have a figure for one of ``outcomes``; re-runs, which come last, before published ones."""
    scored = [outcome for outcome in outcomes if outcome.score is not None]
    shown = [model for model in baselines.beside if any(one.model == model for outcome in scored for one in baselines.of(outcome))]
    return shown[-FIGURES_BESIDE:]


def _not_run(outcome: Outcome) -> str:
    reason = outcome.not_run or "no result"
    return f"not run ({reason if len(reason) <= 60 else reason[:56] + ' ...'})"


def published_table(outcomes: Sequence[Outcome], baselines: Baselines) -> str:
    """Return every published figure for the benchmarks that were run, with its protocol and source."""
    lines = [
        [outcome.label, f"{one.score:.1f}", one.mark(outcome), one.protocol, one.model, one.kind, one.status, one.source]
        for outcome in outcomes
        if outcome.score is not None
        for one in baselines.of(outcome)
    ]
    return _markdown(["benchmark", "figure", "", "its protocol", "model", "kind", "status", "source"], lines) if lines else ""


def report(outcomes: Sequence[Outcome], facts: dict[str, Any], baselines: Baselines) -> str:
    """Return the content of ``report.md``.

    Args:
        facts: settings, model, versions and sandbox, as ``results.json`` holds them.
    """
    model, settings = facts["model"], facts["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    parts = [
        f"# Benchmarks of {model['path']}",
        f"{model['parameters']:,} parameters, {computed(model)}, context {model['max_length']:,}; {versions}.",
    ]
    if settings["limit"]:
        parts.append(f"**Only the first {settings['limit']} documents of each task were read: compare these scores with nothing.**")
    parts.append(
        "Scores are percent unless marked, with the standard error of their mean over documents. Truncated prompts lost their beginning."
    )
    parts.append(table(outcomes, baselines))
    if published := published_table(outcomes, baselines):
        parts += ["## Published figures", published]
    if facts["sandbox"]:
        parts.append(f"Programs written by the model ran under: {facts['sandbox']}.")
    return "\n\n".join(parts) + "\n"


def computed(model: dict[str, Any]) -> str:
    """Return what computed the scores, and how: ``bfloat16 on NVIDIA H100 80GB HBM3, by vllm 0.32.0``."""
    engine = model.get("engine")  # written since there is more than one
    return f"{model['dtype']} on {model['device']}" + (f", by {engine}" if engine else "")


def again(facts: dict[str, Any]) -> str:
    """Return the command that measures the same once more."""
    settings = facts["settings"]
    words = ["python", "-m", "src.cli", "eval"]
    for name in ("model_path", "tasks", "limit"):
        words += [f"--{name}", str(settings[name])]
    for name, usual in (("dtype", "auto"), ("engine", "transformers"), ("data_dir", None)):
        if (value := settings.get(name, usual)) != usual:
            words += [f"--{name}", value]
    words += [f"--{name}" for name in ("ema", "allow_code_exec") if settings.get(name)]
    return shlex.join(words)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    padded = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [header, *lines]]
    rule = " | ".join("-" * max(width, 3) for width in widths)
    return "\n".join(f"| {line} |" for line in [padded[0], rule, *padded[1:]])
