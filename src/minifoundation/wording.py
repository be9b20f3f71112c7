"""Words that messages have in common."""

from __future__ import annotations


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return ``1 shard``, ``2,000 shards``: a number with the noun it counts, whose plural is ``many`` where an s does not make it."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def processes(number: int) -> str:
    """Return ``1 process``, ``8 processes``."""
    return counted(number, "process", "processes")


def micro_batches(number: int) -> str:
    """Return ``1 micro-batch``, ``4 micro-batches``."""
    return counted(number, "micro-batch", "micro-batches")


def short_bytes(size: float) -> str:
    """Return a size as people say it: 34.5 MB, 1.2 TB."""
    return _short(size, "TGMk", " ") + "B"


def short_count(value: float) -> str:
    """Return a number as people say it: 1.5M, 200M, 10B."""
    return _short(value, "TBMk")


def _short(value: float, letters: str, space: str = "") -> str:
    for unit, letter in zip((1e12, 1e9, 1e6, 1e3), letters, strict=True):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{space}{letter}"
    return f"{value:.3g}{space}"
