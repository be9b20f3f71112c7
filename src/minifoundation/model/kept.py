"""What autograd keeps of a block by hand from the forward to the backward: less of it, or in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Kept:
    """Keeps tensors as autograd does."""

    def park(self, tensor: Tensor) -> None:
        """Say that ``tensor`` is one of the large ones that wait for the backward."""

    def pack(self, tensor: Tensor) -> Any:
        """Return what stands for ``tensor`` until the backward."""
        return tensor

    def unpack(self, packed: Any) -> Tensor:
        """Return the tensor that ``packed`` stands for."""
        assert isinstance(packed, Tensor)
        return packed


class _View(NamedTuple):
    """A tensor that is not kept as it is: the storage that stands for its own, and its place in that."""

    storage: Any
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, storage: Any, tensor: Tensor) -> _View:
        return cls(storage, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def within(self, other: Tensor) -> Tensor:
        return other.as_strided(self.size, self.stride, self.offset)


class MadeAgain:
    """Tensors that autograd need not keep, since ``make`` gives them again: once, when the first of them is asked for.

    Args:
        kept: takes whatever else autograd would keep.
    """

    def __init__(self, make: Callable[[], Sequence[Tensor]], kept: Kept) -> None:
        self._make = make
        self._kept = kept
        self._again: Sequence[Tensor] = ()

    @contextmanager
    def instead_of(self, *now: Tensor) -> Iterator[None]:
        """Have autograd keep nothing, inside, that lies in the storage of one of ``now``, the first of what ``make`` will give.

        What else is as large as the first of them is parked.
        """
        numbers = {tensor.untyped_storage().data_ptr(): number for number, tensor in enumerate(now)}
        large = now[0].numel()
        del now  # both hooks live as long as what they have packed, and so would these

        def pack(tensor: Tensor) -> Any:
            number = numbers.get(tensor.untyped_storage().data_ptr())
            if number is not None:
                return _View.of(number, tensor)
            if tensor.numel() >= large:
                self._kept.park(tensor)
            return self._kept.pack(tensor)

        def unpack(packed: Any) -> Tensor:
            if not (isinstance(packed, _View) and isinstance(packed.storage, int)):
                return self._kept.unpack(packed)
            if not self._again:
                self._again = self._make()
            return packed.within(self._again[packed.storage])

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


class Copies(Protocol):
    """Copies from the device to host memory and back, beside what the device computes."""

    def away(self, flat: Tensor) -> Callable[[], Callable[[], Tensor]]:
        """Begin to copy ``flat`` to the host; return what begins the copy back, which returns what waits for it and gives the tensor."""
        ...


class Offloaded(Kept):
    """Keeps what is parked in host memory.

    A backward goes through the blocks from the last to the first: while it is at one, the tensors of the one before come back.

    Args:
        before: of the block whose backward is the next one.
    """

    def __init__(self, before: Offloaded | None, copies: Copies) -> None:
        self._before = before
        self._copies = copies
        self._parked: dict[int, _Parked] = {}

    def park(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parked:
            flat = tensor.detach().as_strided((storage.nbytes() // tensor.itemsize,), (1,), 0)
            self._parked[storage.data_ptr()] = _Parked(self._copies.away(flat))

    def pack(self, tensor: Tensor) -> Any:
        parked = self._parked.get(tensor.untyped_storage().data_ptr())
        return tensor if parked is None else _View.of(parked, tensor)

    def unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _View):
            return super().unpack(packed)
        self.fetch()
        if self._before is not None:
            self._before.fetch()
            self._before = None
        return packed.within(packed.storage.tensor())

    def fetch(self) -> None:
        """Begin to copy back all that is parked; from then on only autograd holds it."""
        for parked in self._parked.values():
            parked.fetch()
        self._parked = {}


class _Parked:
    """A storage in host memory."""

    def __init__(self, fetched: Callable[[], Callable[[], Tensor]]) -> None:
        self._fetched = fetched
        self._ready: Callable[[], Tensor] | None = None

    def fetch(self) -> None:
        if self._ready is None:
            self._ready = self._fetched()

    def tensor(self) -> Tensor:
        assert self._ready is not None
        return self._ready()


class PageLocked:
    """Copies to page-locked memory and back, on a stream for each direction."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def away(self, flat: Tensor) -> Callable[[], Callable[[], Tensor]]:
        host = torch.empty(len(flat), dtype=flat.dtype, pin_memory=True)  # from a cache: made anew in the first step alone
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            host.copy_(flat, non_blocking=True)
            flat.record_stream(self._out)  # its memory is not given away before it has been copied
            copied = self._out.record_event()

        def fetched() -> Callable[[], Tensor]:
            back = torch.empty_like(host, device=self._device)
            self._in.wait_stream(torch.cuda.current_stream(self._device))  # what had this memory before may still be at work
            self._in.wait_event(copied)
            with torch.cuda.stream(self._in):
                back.copy_(host, non_blocking=True)
                there = self._in.record_event()

            def ready() -> Tensor:
                torch.cuda.current_stream(self._device).wait_event(there)
                return back

            return ready

        return fetched
