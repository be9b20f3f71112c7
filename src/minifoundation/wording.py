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
