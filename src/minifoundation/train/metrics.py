"""What a run reports: metrics.csv, the progress line, TensorBoard; and the arithmetic of its counters."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from minifoundation.errors import UserError

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
)


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
    """

    def __init__(self, out_dir: Path | None, *, resumed_at: int, tensorboard: bool) -> None:
        self._file: IO[str] | None = None
        self._board: Any = None
        if out_dir is None:
            return
        path = out_dir / "metrics.csv"
        kept = _rows_until(path, resumed_at) if resumed_at else []
        part = path.with_suffix(".part")
        with part.open("w", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS).writeheader()
            csv.DictWriter(file, COLUMNS).writerows(kept)
        part.replace(path)
        self._file = path.open("a", newline="", encoding="utf-8")
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("train.tensorboard", "on, but tensorboard is not installed", "pip install tensorboard") from None
            self._board = SummaryWriter(str(out_dir / "tensorboard"), purge_step=resumed_at + 1)

    def write(self, row: Row) -> None:
        """Add one row; values that are None stay empty."""
        if self._file is None:
            return
        shown = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        csv.DictWriter(self._file, COLUMNS).writerow(shown)
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._board.add_scalar(name, value, row["step"])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def _rows_until(path: Path, step: int) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: row[name] for name in COLUMNS} for row in csv.DictReader(file) if row["step"].isdigit() and int(row["step"]) <= step]
