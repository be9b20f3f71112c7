"""Figures to stand beside ours: published ones with their protocol and source, and other models' results of this very harness."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from minifoundation.config import REPOSITORY, read_yaml
from minifoundation.errors import UserError
from minifoundation.evaluate.results import Outcome, read_results, restored

BASELINES = REPOSITORY / "configs" / "baselines.yaml"
MARKS = {
    "=": "measured the same way",
    "~": "same shots, the rest is not stated",
    "≠": "measured another way, with shots that are not stated, or on other documents",
}
RERUN = "re-run here"
"""Status of a score that is no publisher's but came from this harness."""


@dataclass(frozen=True)
class Figure:
    """A score in percent that someone else's model has; shots or measure are None where its source does not state them."""

    model: str
    kind: str
    status: str
    source: str
    score: float
    shots: int | None
    measure: str | None
    n: int | None = None
    """Documents, where they are known: of a re-run."""

    def mark(self, outcome: Outcome) -> str:
        """Return whether this was measured as ``outcome`` was: a key of ``MARKS``."""
        other_documents = outcome.is_sample if self.n is None else outcome.n != self.n
        if other_documents or self.shots != outcome.shots or self.measure not in (None, outcome.measure):
            return "≠"
        return "~" if self.measure is None else "="

    @property
    def protocol(self) -> str:
        shots = "shots not stated" if self.shots is None else f"{self.shots}-shot"
        return f"{shots}, {self.measure or 'measure not stated'}"


@dataclass(frozen=True)
class Baselines:
    """Figures by benchmark, those of re-runs by label, and the models that stand beside ours in the main table."""

    figures: dict[str, list[Figure]]
    beside: list[str]

    @classmethod
    def load(cls, path: Path = BASELINES, *, reruns: Sequence[Path] = ()) -> Baselines:
        """Return the published figures of a YAML file, and the scores in ``reruns``, folders that ``eval`` wrote for other models.

        Raises:
            UserError: one of them holds no results.
        """
        content = read_yaml(path)
        figures: dict[str, list[Figure]] = {}
        for model in content["models"]:
            for key, (score, shots, measure) in model["scores"].items():
                figure = Figure(model["name"], model["kind"], model["status"], model["source"], score, shots, measure)
                figures.setdefault(key, []).append(figure)
        beside = list(content["beside"])
        for folder in reruns:
            results = read_results(folder)
            name = f"{short_name(results['model'])} ({RERUN})"
            beside.append(name)
            for row in results["rows"]:
                outcome = restored(row)
                if outcome.score is not None:
                    score = outcome.scale * outcome.score
                    figures.setdefault(_rerun(outcome.label), []).append(
                        Figure(name, "any", RERUN, str(folder), score, outcome.shots, outcome.measure, outcome.n)
                    )
        return cls(figures, beside)

    def with_columns(self, models: Sequence[str]) -> Baselines:
        """Return the same figures with published ``models`` in the columns, before the re-runs.

        Raises:
            UserError: one of them has no figure.
        """
        known = list(dict.fromkeys(one.model for figures in self.figures.values() for one in figures if one.status != RERUN))
        for model in models:
            if model not in known:
                near = get_close_matches(model, known, n=1)
                remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
                raise UserError("--vendors", f"{model!r} has no figure in {BASELINES.name}", remedy)
        return Baselines(self.figures, [*models, *(name for name in self.beside if name.endswith(f"({RERUN})"))])

    def of(self, outcome: Outcome) -> list[Figure]:
        """Return the figures for the benchmark of ``outcome``, of several re-runs those on as many documents first."""
        reruns = sorted(self.figures.get(_rerun(outcome.label), []), key=lambda one: one.n != outcome.n)
        return [*self.figures.get(outcome.request.row.baseline or "", []), *reruns]

    def nearest(self, outcome: Outcome, model: str) -> Figure | None:
        """Return the figure of ``model`` that was measured most as ``outcome`` was: by its mark, then by its shots."""
        own = [one for one in self.of(outcome) if one.model == model]
        return min(own, key=lambda one: (list(MARKS).index(one.mark(outcome)), one.shots != outcome.shots), default=None)


def _rerun(label: str) -> str:
    """Return the key of re-runs of a label, whatever their limit: it shows in the mark. Labels and keys of the YAML share one table."""
    return f"{RERUN}: {re.sub(r' limit=[0-9]+', '', label)}"


def short_name(model: dict[str, Any]) -> str:
    """Return the name of a model in ``results.json``: the last two parts of its path at most."""
    return "/".join(Path(model["path"]).parts[-2:])
