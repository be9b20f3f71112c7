"""Stands for one of several processes that read rows together, where no others are."""

from __future__ import annotations

from torch import Tensor


class Part:
    """One of ``size`` models that read rows together, where what is gathered is there already."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def chunks(self, seq_len: int) -> list[tuple[int, int]]:
        length = seq_len // (2 * self.size)
        return [(number * length, (number + 1) * length) for number in (self.rank, 2 * self.size - 1 - self.rank)]

    def gathered(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v
