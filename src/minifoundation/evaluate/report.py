"""What is written of an evaluation: ``results.json`` with everything, ``report.md`` with the tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from minifoundation.config import REPOSITORY, read_yaml
from minifoundation.errors import UserError
from minifoundation.evaluate.protocols import Outcome

BASELINES = REPOSITORY / "configs" / "baselines.yaml"
MARKS = {"=": "measured the same way", "~": "same shots, the rest is not stated", "≠": "measured another way, or on other documents"}


@dataclass(frozen=True)
class Published:
    """A published figure in percent; shots or measure are None where its source does not state them."""

    model: str
    kind: str
    status: str
    source: str
    score: float
    shots: int | None
    measure: str | None

    def mark(self, outcome: Outcome) -> str:
        """Return whether this was measured as ``outcome`` was: a key of ``MARKS``."""
        sample = outcome.n < (outcome.request.row.documents or 0)
        if sample or self.shots != outcome.shots or self.measure not in (None, outcome.measure):
            return "≠"
        return "~" if self.measure is None else "="

    @property
    def protocol(self) -> str:
        shots = "shots not stated" if self.shots is None else f"{self.shots}-shot"
        return f"{shots}, {self.measure or 'measure not stated'}"


@dataclass(frozen=True)
class Baselines:
    """The published figures by benchmark, and the models that stand beside ours in the main table."""

    figures: dict[str, list[Published]]
    beside: list[str]

    @classmethod
    def load(cls, path: Path = BASELINES) -> Baselines:
        content = read_yaml(path)
        figures: dict[str, list[Published]] = {}
        for model in content["models"]:
            for key, (score, shots, measure) in model["scores"].items():
                published = Published(model["name"], model["kind"], model["status"], model["source"], score, shots, measure)
                figures.setdefault(key, []).append(published)
        return cls(figures, content["beside"])

    def of(self, outcome: Outcome) -> list[Published]:
        return self.figures.get(outcome.request.row.baseline or "", [])


def free_folder(wanted: Path) -> Path:
    """Return ``wanted``, or ``wanted-2``, ``wanted-3`` ... when earlier results are there: none are overwritten."""
    folder, number = wanted, 1
    while (folder / "results.json").exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    if folder.exists() and not folder.is_dir():
        raise UserError("--out_dir", f"{folder} is a file", "give the name of a folder")
    return folder


def table(outcomes: Sequence[Outcome], baselines: Baselines) -> str:
    """Return the main table in Markdown: one line an outcome, scores in percent."""
    shown = [model for model in baselines.beside if any(one.model == model for outcome in outcomes for one in baselines.of(outcome))]
    header = ["benchmark", "protocol", "score", "± s.e.", "chance", "n", "truncated", *shown]
    lines = []
    for outcome in outcomes:
        chance = outcome.request.row.chance
        if outcome.not_run or outcome.score is None:
            lines.append([outcome.label, _not_run(outcome), "", "", _percent(chance), "", "", *[""] * len(shown)])
            continue
        also = "".join(f" ({name} {value:.4g})" for name, value in outcome.also.items())
        cells = [outcome.label, outcome.protocol, _percent(outcome.score) + also, _percent(outcome.stderr, 2), _percent(chance)]
        whole = outcome.request.row.documents or 0
        cells.append(f"{outcome.n} of {whole}" if outcome.n < whole else str(outcome.n))
        cells.append(f"{outcome.truncated} of {outcome.requests}" if outcome.truncated else "0")
        for model in shown:
            best = next((one for one in baselines.of(outcome) if one.model == model), None)
            cells.append(f"{best.score:.1f} {best.mark(outcome)}" if best else "")
        lines.append(cells)
    legend = "; ".join(f"{mark} {meaning}" for mark, meaning in MARKS.items())
    cut = [outcome for outcome in outcomes if outcome.not_run and outcome.not_run not in _not_run(outcome)]
    parts = [_markdown(header, lines), *(f"{outcome.label} not run: {outcome.not_run}" for outcome in cut)]
    return "\n\n".join(parts + [f"Published figures beside ours: {legend}."] * bool(shown))


def _not_run(outcome: Outcome) -> str:
    return f"not run ({shorten(outcome.not_run or 'no result', 60, placeholder=' ...')})"


def published_table(outcomes: Sequence[Outcome], baselines: Baselines) -> str:
    """Return every published figure for the benchmarks that were run, with its protocol and source."""
    lines = [
        [outcome.label, f"{one.score:.1f}", one.mark(outcome), one.protocol, one.model, one.kind, one.status, one.source]
        for outcome in outcomes
        if outcome.score is not None
        for one in baselines.of(outcome)
    ]
    return _markdown(["benchmark", "figure", "", "its protocol", "model", "kind", "status", "source"], lines) if lines else ""


def write(folder: Path, outcomes: Sequence[Outcome], facts: dict[str, Any], baselines: Baselines) -> None:
    """Write ``results.json`` and ``report.md`` to ``folder``, each whole or not at all.

    Args:
        facts: settings, model, versions and sandbox, as ``results.json`` shall hold them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [_row(outcome) for outcome in outcomes]
    _replace(folder / "results.json", json.dumps({**facts, "rows": rows}, indent=1, default=_plain, ensure_ascii=False) + "\n")
    model, settings = facts["model"], facts["settings"]
    parts = [
        f"# Benchmarks of {model['path']}",
        f"{model['parameters']:,} parameters, {model['dtype']} on {model['device']}, context {model['max_length']:,}; "
        + ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        + ".",
    ]
    if settings["limit"]:
        parts.append(f"**Only the first {settings['limit']} documents of each task were read: compare these scores with nothing.**")
    parts.append("Scores are percent, with the standard error of their mean over documents. Truncated prompts lost their beginning.")
    parts.append(table(outcomes, baselines))
    if published := published_table(outcomes, baselines):
        parts += ["## Published figures", published]
    if facts["sandbox"]:
        parts.append(f"Programs written by the model ran under: {facts['sandbox']}.")
    _replace(folder / "report.md", "\n\n".join(parts) + "\n")


def _row(outcome: Outcome) -> dict[str, Any]:
    fields = {name: value for name, value in vars(outcome).items() if name not in ("request", "samples", "raw")}
    return fields | {"row": asdict(outcome.request.row), "lm_eval": outcome.raw}


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _plain(value: Any) -> Any:
    """Return numpy scalars as numbers, anything else that JSON does not know as text."""
    return value.item() if hasattr(value, "item") else str(value)


def _percent(share: float | None, digits: int = 1) -> str:
    return "" if share is None else f"{100 * share:.{digits}f}"


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    padded = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [header, *lines]]
    rule = " | ".join("-" * max(width, 3) for width in widths)
    return "\n".join(f"| {line} |" for line in [padded[0], rule, *padded[1:]])
