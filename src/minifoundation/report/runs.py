"""A run folder as the report reads it: settings, metrics, ledger."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from minifoundation import config
from minifoundation.checkpoint import FINAL, latest_good, load_checkpoint
from minifoundation.config import RunConfig
from minifoundation.data.ledger import Entry
from minifoundation.errors import UserError
from minifoundation.wording import counted

WINDOW = 31
"""Logged steps before a step, whose median and spread say whether its loss is a spike."""


@dataclass(frozen=True)
class Run:
    """What a folder of ``pretrain`` or ``longft`` holds.

    Attributes:
        columns: of ``metrics.csv`` by name; NaN where a cell is empty.
        phase, ledger: of its checkpoint; an empty ledger where there is none.
        step, tokens: how far the run came, by its checkpoint or, where that goes on, its metrics.
        skipped: steps whose update was left out.
        went_back: how often, to pass over bad steps.
        before: tokens that the phases before it have read, by the ledger.
        imported_from: the folder of the weights that the first phase began from, where they came from elsewhere.
    """

    folder: Path
    settings: RunConfig
    columns: dict[str, list[float]]
    phase: str
    step: int
    tokens: int
    skipped: int
    went_back: int
    ledger: tuple[Entry, ...]
    before: int
    imported_from: str | None

    def column(self, name: str) -> list[float]:
        """Return a column of the metrics, NaN for a run that did not have it."""
        return self.columns.get(name) or [math.nan] * len(self.columns["step"])

    @property
    def hours(self) -> float:
        """Hours of training by the logged rates, without start-up, evaluations and saves."""
        before, seconds = 0.0, 0.0
        for tokens, rate in zip(self.columns["tokens"], self.column("tokens_per_second"), strict=True):
            seconds += (tokens - before) / rate if rate > 0 else 0.0
            before = tokens
        return seconds / 3600

    def last(self, name: str) -> float | None:
        """Return the last value of a column that is not empty."""
        return next((value for value in reversed(self.column(name)) if not math.isnan(value)), None)

    @property
    def spikes(self) -> list[int]:
        """Return the logged steps whose loss stands out of those before it."""
        return [int(self.columns["step"][place]) for place in spikes(self.column("loss"))]

    @property
    def trouble(self) -> str:
        """What went wrong on the way, for a person."""
        found = f"loss spikes: {', '.join(map(str, self.spikes)) or 'none'}"
        found += f"; {counted(self.skipped, 'step')} skipped" if self.skipped else ""
        return found + (f"; went back {counted(self.went_back, 'time')}" if self.went_back else "")


def spikes(losses: Sequence[float]) -> list[int]:
    """Return the places of losses more than 8 median absolute deviations, and 0.1 nats, above the median of the ``WINDOW`` before."""
    found = []
    for place in range(WINDOW, len(losses)):
        before = [loss for loss in losses[place - WINDOW : place] if math.isfinite(loss)]  # a step that was skipped may have none
        if not before:
            continue
        middle = median(before)
        spread = median(abs(value - middle) for value in before)
        if losses[place] - middle > max(0.1, 8 * spread):
            found.append(place)
    return found


def _number(cell: str | None) -> float:
    """Return a cell of ``metrics.csv``, NaN where it is empty or a word."""
    try:
        return float(cell or "nan")
    except ValueError:
        return math.nan


def read_run(folder: Path) -> Run:
    """Return the run in ``folder``.

    Raises:
        UserError: no such folder, or one that holds no run.
    """
    remedy = "give the out_dir of a pretrain or longft run"
    if not (folder / "config.yaml").is_file() or not (folder / "metrics.csv").is_file():
        inside = [path.parent for path in sorted(folder.glob("*/metrics.csv"), key=lambda path: path.stat().st_mtime)]  # as trained
        if inside:
            remedy = f"did you mean {','.join(map(str, inside))}?"
        raise UserError(
            "--runs", f"{folder} holds no config.yaml and metrics.csv" if folder.is_dir() else f"{folder}: no such folder", remedy
        )
    settings = config.build(RunConfig, config.read_yaml(folder / "config.yaml"), str(folder / "config.yaml"))
    content = (folder / "metrics.csv").read_bytes()
    whole = content[: content.rfind(b"\n") + 1]  # a row that is being written, or was cut short, can end within a number
    try:
        rows = list(csv.DictReader(io.StringIO(whole.decode("utf-8-sig"), newline="")))
    except (ValueError, csv.Error) as error:
        raise UserError("--runs", f"{folder / 'metrics.csv'} is damaged ({error})", remedy) from None
    if rows and not {"step", "tokens", "loss"} <= rows[0].keys():
        raise UserError("--runs", f"{folder / 'metrics.csv'} has no columns step, tokens and loss", remedy)
    rows = [row for row in rows if math.isfinite(_number(row["step"]) + _number(row["tokens"]))]
    if not rows:
        raise UserError("--runs", f"{folder / 'metrics.csv'} has no rows yet", "wait for the first steps")
    columns = {name: [_number(row[name]) for row in rows] for name in rows[0] if name}
    path = folder / FINAL if (folder / FINAL).exists() else latest_good(folder, print)
    step, tokens = int(columns["step"][-1]), int(columns["tokens"][-1])
    progress: dict[str, Any] = {"phase": "pretrain"}
    ledger: tuple[Entry, ...] = ()
    if path is not None:
        checkpoint = load_checkpoint(path)
        progress, ledger = checkpoint.progress, tuple(Entry(**entry) for entry in checkpoint.ledger)
        if progress["step"] >= step:
            step, tokens = progress["step"], progress.get("tokens", tokens)
    own = progress.get("sample", 0) * settings.train.seq_len
    before = max(0, sum(entry.tokens for entry in ledger) - own)
    return Run(
        folder=folder,
        settings=settings,
        columns=columns,
        phase=progress["phase"],
        step=step,
        tokens=tokens,
        skipped=sum(bool(row.get("skipped")) for row in rows),
        went_back=len(progress.get("stepped_over", ())),
        ledger=ledger,
        before=before,
        imported_from=progress.get("imported_from"),
    )


def refuse_unrelated(runs: Sequence[Run]) -> None:
    """Refuse runs that are not the phases of one model, whose tokens would be added up.

    Raises:
        UserError: one has not read more before it than the one before.
    """
    for earlier, later in pairwise(runs):
        if later.ledger and later.before <= earlier.before:
            remedy = "give the phases of one model, in the order of training; another model has a report of its own"
            raise UserError("--runs", f"{later.folder} is no later phase of {earlier.folder}", remedy)
