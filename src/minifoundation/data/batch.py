"""Micro-batches on their way to the device."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minifoundation.data.tokenizer import EOS


@dataclass(frozen=True)
class Batch:
    """Rows of a micro-batch: each target is the token after the one at its place."""

    tokens: Tensor
    """(B, T) int64"""
    targets: Tensor
    """(B, T) int64"""
    cu_seqlens: Tensor | None = None
    """Where each document begins in the flattened tokens, and their number at the end: (documents + 1,) int32; None when attention
    crosses documents."""
    spanned: float | None = None
    """Mean over the tokens of the length of what attention spans there; None where that is a row of ``tokens``."""

    @classmethod
    def of_rows(cls, rows: npt.NDArray[np.int64], *, mask_documents: bool = False, eos: int = EOS) -> Batch:
        """Return the batch of rows (B, T + 1), with the documents in it when attention is to stay within them.

        A document begins after the ``eos`` of another; the rest of one that a row begins in the middle of counts as one.
        """
        both = torch.from_numpy(rows)
        tokens, targets = both[:, :-1].contiguous(), both[:, 1:].contiguous()
        if not mask_documents:
            return cls(tokens, targets)
        begins = np.ones(tokens.shape, np.bool_)
        begins[:, 1:] = rows[:, :-2] == eos
        cu_seqlens = np.append(np.flatnonzero(begins), begins.size)
        spanned = float((np.diff(cu_seqlens) ** 2).sum() / begins.size)
        return cls(tokens, targets, torch.from_numpy(cu_seqlens.astype(np.int32)), spanned)

    @property
    def attended_length(self) -> float:
        """Mean over the tokens of the length of what attention spans there: the row, or the document when it stays within them."""
        return self.tokens.shape[1] if self.spanned is None else self.spanned

    def part(self, chunks: Sequence[tuple[int, int]]) -> Batch:
        """Return the batch of these ``chunks`` of each row, (first, end); documents and lengths stay those of whole rows."""
        tokens, targets = (torch.cat([x[:, first:end] for first, end in chunks], dim=1) for x in (self.tokens, self.targets))
        return replace(self, tokens=tokens, targets=targets, spanned=self.attended_length)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``; from page-locked memory the copy is not waited for."""
        return self._moved(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory."""
        return self._moved(Tensor.pin_memory)

    def read_on(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that ``stream`` reads the batch, which another one has made: its memory is not given away before."""
        for x in (self.tokens, self.targets, self.cu_seqlens):
            if x is not None:
                x.record_stream(stream)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Batch:
        cu_seqlens = None if self.cu_seqlens is None else move(self.cu_seqlens)
        return replace(self, tokens=move(self.tokens), targets=move(self.targets), cu_seqlens=cu_seqlens)


@contextmanager
def prefetch(steps: Iterable[list[Batch]], device: torch.device, *, ahead: int = 2) -> Iterator[Iterator[list[Batch]]]:
    """Give an iterator over ``steps`` on ``device`` that a background thread keeps ``ahead`` steps in front; leaving the context stops it.

    A GPU copies them from page-locked memory on a stream of its own, beside the steps before. What goes wrong in the thread is raised
    where the next step is asked for.
    """
    ready: queue.Queue[tuple[list[Batch], torch.cuda.Event | None] | BaseException | None] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()
    copying = torch.cuda.Stream(device) if device.type == "cuda" else None

    def offer(item: tuple[list[Batch], torch.cuda.Event | None] | BaseException | None) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def read() -> None:
        try:
            if copying is not None:
                torch.cuda.set_device(device)  # a new thread begins on device 0, where pinning would open a context
            for batches in steps:
                if copying is None:
                    offer(([batch.to(device) for batch in batches], None))
                else:
                    with torch.cuda.stream(copying):
                        there = [batch.pin_memory().to(device) for batch in batches]
                        offer((there, copying.record_event()))
                if stopped.is_set():
                    return
            offer(None)
        except BaseException as error:
            offer(error)

    def handed_over() -> Iterator[list[Batch]]:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            batches, copied = item
            if copied is not None:
                now = torch.cuda.current_stream(device)
                now.wait_event(copied)  # the device waits for the copy, Python does not
                for batch in batches:
                    batch.read_on(now)
            yield batches

    thread = threading.Thread(target=read, name="data", daemon=True)
    thread.start()
    try:
        yield handed_over()
    finally:
        stopped.set()
        thread.join()
