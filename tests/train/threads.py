"""Processes that are threads: what they tell each other by words, without torch.distributed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from minifoundation.distributed import World

T = TypeVar("T")


class Thread(World):
    """One of several processes that are threads."""

    said: list[Any]
    barrier: threading.Barrier

    def of_all(self, value: Any) -> list[Any]:
        self.said[self.rank] = value
        self.barrier.wait(10)
        found = list(self.said)
        self.barrier.wait(10)
        return found

    def least(self, values: Tensor) -> Tensor:
        return torch.stack(self.of_all(values)).amin(0)

    def agreed(self, work: Callable[[], T]) -> T:
        """Return what ``work`` returns on the first one; it may not raise."""
        found: T = self.of_all(work() if self.is_first else None)[0]
        return found


def threads(size: int) -> list[World]:
    """Return the worlds of ``size`` threads."""
    said, barrier = [None] * size, threading.Barrier(size)
    found = [Thread(rank, size) for rank in range(size)]
    for one in found:
        object.__setattr__(one, "said", said)
        object.__setattr__(one, "barrier", barrier)
    return list(found)
