"""Micro-batches on their way to the device."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows of a micro-batch: each target is the token after the one at its place."""

    tokens: Tensor
    """(B, T) int64"""
    targets: Tensor
    """(B, T) int64"""

    @classmethod
    def of_rows(cls, rows: npt.NDArray[np.int64]) -> Batch:
        """Return the batch of rows (B, T + 1)."""
        both = torch.from_numpy(rows)
        return cls(both[:, :-1].contiguous(), both[:, 1:].contiguous())


@contextmanager
def prefetch(steps: Iterable[list[Batch]], *, pin: bool, ahead: int = 2) -> Iterator[Iterator[list[Batch]]]:
    """Give an iterator over ``steps`` that a background thread keeps ``ahead`` steps in front; leaving the context stops it.

    What goes wrong in the thread is raised where the next step is asked for.

    Args:
        pin: put the batches in page-locked memory, so that copies to the device need not be waited for.
    """
    ready: queue.Queue[list[Batch] | BaseException | None] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()
    device = torch.cuda.current_device() if pin else None

    def offer(item: list[Batch] | BaseException | None) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def read() -> None:
        try:
            if device is not None:
                torch.cuda.set_device(device)  # a new thread begins on device 0, where pinning would open a context
            for batches in steps:
                offer([Batch(batch.tokens.pin_memory(), batch.targets.pin_memory()) for batch in batches] if pin else batches)
                if stopped.is_set():
                    return
            offer(None)
        except BaseException as error:
            offer(error)

    def handed_over() -> Iterator[list[Batch]]:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    thread = threading.Thread(target=read, name="data", daemon=True)
    thread.start()
    try:
        yield handed_over()
    finally:
        stopped.set()
        thread.join()
