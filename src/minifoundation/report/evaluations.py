"""Evaluations as the report shows them: rows with error, chance, protocol, clean and dirty items, and other models' figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minifoundation.evaluate.baselines import MARKS, Baselines, short_name
from minifoundation.evaluate.contamination import SIZES, Separated, separated
from minifoundation.evaluate.results import Outcome, read_items, read_results, restored
from minifoundation.report.plots import Point
from minifoundation.report.runs import Run


@dataclass(frozen=True)
class Evaluation:
    """A folder that ``eval`` wrote.

    Attributes:
        facts: everything in ``results.json`` but its rows.
    """

    folder: Path
    facts: dict[str, Any]
    outcomes: tuple[Outcome, ...]

    @property
    def name(self) -> str:
        return short_name(self.facts["model"])

    @property
    def tokens(self) -> int | None:
        """That the model had read in training, of an imported one since then; None where nobody knows."""
        model = self.facts["model"]
        tokens: int | None = model.get("trained_tokens") if self.imported_from is None else model.get("tokens_since_import")
        return tokens

    @property
    def imported_from(self) -> str | None:
        origin: str | None = self.facts["model"].get("imported_from")
        return origin

    @property
    def is_sample(self) -> bool:
        """Whether not all documents were read of every task."""
        return any(outcome.is_sample for outcome in self.outcomes if outcome.score is not None)


@dataclass(frozen=True)
class Line:
    """One row of the benchmark table."""

    outcome: Outcome
    figures: tuple[tuple[str, str] | None, ...]
    """Score and mark of each model in the columns, None where it has none."""
    separated: dict[int, Separated]
    """Clean and dirty items by the length of the n-gram, empty where nobody looked."""


def read_evaluation(folder: Path) -> Evaluation:
    """Return the evaluation in ``folder``; raises a UserError when there is none."""
    content = read_results(folder)
    rows = content.pop("rows")
    return Evaluation(folder, content, tuple(restored(row) for row in rows))


def lines(evaluation: Evaluation, baselines: Baselines, columns: Sequence[str], contamination: dict[str, Any] | None) -> list[Line]:
    """Return the rows of the benchmark table; models in ``columns`` stand beside ours."""
    found = {row["benchmark"]: row for row in (contamination or {}).get("benchmarks", ())}
    made = []
    for outcome in evaluation.outcomes:
        best = [baselines.nearest(outcome, model) for model in columns]
        figures = tuple((f"{one.score:.1f}", one.mark(outcome)) if one else None for one in best)
        row, items = found.get(outcome.request.row.name), read_items(evaluation.folder, outcome.label)
        aggregate = outcome.request.row.aggregate
        apart = {n: separated(items, row, n, aggregate=aggregate) for n in SIZES} if row is not None and items and outcome.is_share else {}
        made.append(Line(outcome, figures if outcome.score is not None else tuple(None for _ in best), apart))
    return made


def points(evaluation: Evaluation, baselines: Baselines, columns: Sequence[str], ours: str) -> list[Point]:
    """Return our scores and those of the models in ``columns`` for the plot, one figure a model and benchmark."""
    made = []
    for outcome in evaluation.outcomes:
        if outcome.score is None or not outcome.is_share:
            continue
        chance = outcome.request.row.chance
        error = None if outcome.stderr is None else 100 * outcome.stderr
        made.append(Point(ours, outcome.label, 100 * outcome.score, not outcome.is_sample, error, None if not chance else 100 * chance))
        for model in columns:
            one = baselines.nearest(outcome, model)
            if one is not None:
                made.append(Point(model, outcome.label, one.score, one.mark(outcome) == "="))
    return made


def over_tokens(evaluations: Sequence[Evaluation], runs: Sequence[Run]) -> dict[str, list[tuple[float, float, float | None]]]:
    """Return by benchmark (training tokens, score, standard error) in percent.

    Of the evaluations that know their tokens, and of what runs have measured while they trained, one phase after the other. Tokens of a
    model that was imported count from there, and those of models with another beginning do not belong beside them.
    """
    scores: dict[str, list[tuple[float, float, float | None]]] = {}
    before = runs[0].before if runs else 0
    origin = runs[-1].imported_from if runs else evaluations[0].imported_from if evaluations else None
    for run in runs:
        for name in run.columns:
            measured = run.columns[name] if name.startswith("eval/") else []
            points = [
                (before + tokens, 100 * score, None)
                for tokens, score in zip(run.columns["tokens"], measured, strict=False)
                if 0 <= score <= 1  # a share, and not nan
            ]
            if points:
                scores.setdefault(name.removeprefix("eval/"), []).extend(points)
        before += run.tokens
    for evaluation in evaluations:
        for outcome in evaluation.outcomes:
            if evaluation.tokens and evaluation.imported_from == origin and outcome.score is not None and outcome.is_share:
                error = None if outcome.stderr is None else 100 * outcome.stderr
                scores.setdefault(f"{outcome.label}", []).append((evaluation.tokens, 100 * outcome.score, error))
    return scores


LEGEND = "; ".join(f"{mark} {meaning}" for mark, meaning in MARKS.items())
