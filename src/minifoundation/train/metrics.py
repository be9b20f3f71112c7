"""What a run reports: metrics.csv, the progress line, TensorBoard; and the arithmetic of its counters."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from minifoundation.checkpoint import write_whole
from minifoundation.errors import UserError

METRICS = "metrics.csv"
COLUMNS = (
    "step",
    "tokens",
    "loss",
    "z_loss",
    "held_out_bits_per_byte",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "peak_memory_gib",
    "data_wait_seconds",
    "cut_off",
    "skipped",
)
"""``cut_off``: tensors in 8 bits of which some value was larger than its scale foresaw.
``skipped`` is why a step changed nothing; empty for the others."""


Row = dict[str, Any]
"""The figures of one step by column; None stays empty."""


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Return the code length of the text in bits per UTF-8 byte: comparable between tokenizers."""
    return nats_per_token / math.log(2) / bytes_per_token


def model_flops_utilisation(tokens_per_second: float, flops_per_token: float, peak_flops: float | None, devices: int) -> float | None:
    """Return achieved over peak FLOP/s (PaLM, arXiv:2204.02311, appendix B), None where the peak is not known."""
    return tokens_per_second * flops_per_token / (peak_flops * devices) if peak_flops else None


class MetricsLog:
    """``metrics.csv`` and, when asked, TensorBoard; rows of steps after ``resumed_at`` are dropped when a run goes on from there.

    With ``out_dir`` None (every process but the first) nothing is written.

    Args:
        also: columns beside ``COLUMNS``; those that the file has of an earlier start stay.
    """

    def __init__(self, out_dir: Path | None, *, resumed_at: int, tensorboard: bool, also: Sequence[str] = ()) -> None:
        self._file: IO[str] | None = None
        self._board: Any = None
        if out_dir is None:
            return
        path = out_dir / METRICS
        kept = _rows_until(path, resumed_at) if resumed_at else []
        self._columns = list(dict.fromkeys([*COLUMNS, *(kept[0] if kept else ()), *also]))
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, self._columns, restval="")
        table.writeheader()
        table.writerows(kept)
        write_whole(path, text.getvalue().encode())
        self._file = path.open("a", newline="", encoding="utf-8")
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("train.tensorboard", "on, but tensorboard is not installed", "pip install tensorboard") from None
            self._board = SummaryWriter(str(out_dir / "tensorboard"), purge_step=resumed_at + 1)

    def write(self, row: Row) -> None:
        """Add one row; values that are None stay empty.

        Raises:
            OSError: it could not be written, as on a full disk; it is with the next one that can.
        """
        if self._file is None:
            return
        shown = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        try:
            csv.DictWriter(self._file, self._columns, restval="").writerow(shown)
            self._file.flush()
        except OSError as error:
            error.filename = error.filename or self._file.name
            raise
        if self._board is not None:
            for name, value in row.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(name, value, row["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            with suppress(OSError):  # rows that could not be written have been told of
                self._file.close()
        if self._board is not None:
            self._board.close()


def _rows_until(path: Path, step: int) -> list[dict[str, str]]:
    if not path.exists():
        return []
    # A row that a full disk or a power cut has torn lacks its last columns, and its step may be the beginning of a longer number.
    whole = [row for row in table(path) if None not in row.values()]
    rows = [row for row in whole if row["step"].isdigit() and int(row["step"]) <= step]
    return [{name: row.get(name) or "" for name in dict.fromkeys([*COLUMNS, *filter(None, row)])} for row in rows]


def table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a ``metrics.csv`` by column, torn ones among them; bytes that are no text are replaced.

    Raises:
        UserError: its first line does not name the columns.
    """
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.DictReader(file)
        try:
            if "step" in (rows.fieldnames or COLUMNS):
                return list(rows)
        except csv.Error:
            pass
    raise UserError(str(path), "is no table of metrics", "restore it, or move it away: a resumed run then begins another one")
