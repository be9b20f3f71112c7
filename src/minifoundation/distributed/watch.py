"""A process that stands still is named, and the others do not wait for it for ever."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from minifoundation.distributed.world import World

LONGER = 5.0
"""How many times its longest turn so far a process may take before it counts as standing still."""
LEAVING = 10.0
"""Seconds that a process which was told to stop has for the step it is in, at the least."""
FAILED = 1


class Beat(NamedTuple):
    """What a process says of itself."""

    number: int
    """Of the beat: it goes up as long as the process runs at all."""
    turns: int
    """How often it has come round."""
    host: str


def leave(line: str, *, say: bool = True) -> NoReturn:
    """End this process at once, without taking leave of others that may never answer; torchrun ends those."""
    if say:
        sys.stderr.write(f"\nerror: {line}\n")
        sys.stderr.flush()
    os._exit(FAILED)


class Watch:
    """Looks after the processes from a thread in each, which goes on when a collective holds up the main one.

    ``turn`` is called by all processes at the same places. One that has been in a turn for too long reads what the others say, through
    torchrun's store: one that says nothing any more, or is turns behind, is at fault. The first process that is not says so in one line,
    and all leave with an error, so that torchrun can start them again. What NCCL was doing goes to a file (the flight recorder).
    Where nobody is at fault nothing is done.

    A signal to stop is acted on between two turns by the main thread; when the turn does not end, since another process is gone, by this.

    Args:
        seconds: of a turn; one that is ``LONGER`` times the longest so far is never too long.
        folder: for what NCCL was doing.
    """

    def __init__(self, world: World, seconds: float, folder: Path) -> None:
        self._world, self._seconds, self._folder = world, seconds, folder
        self._tick = min(2.0, seconds / 10)
        self._turns = 0
        self._began: float | None = None
        self._longest = 0.0
        self._told: float | None = None
        self._warned = False
        self._done = threading.Event()
        self._signals, self._wake = -1, -1
        if world.size > 1:
            self._signals, self._wake = os.pipe()
            os.set_blocking(self._wake, False)

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        """Watch until the context is left."""
        if self._world.size == 1:
            yield self
            return
        former = signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._watch_or_not, name="watch", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._done.set()
            thread.join()
            signal.set_wakeup_fd(former)
            os.close(self._signals)
            os.close(self._wake)

    def turn(self) -> None:
        """Come round: from now on the next turn is timed."""
        now = time.monotonic()
        if self._began is not None:
            self._longest = max(self._longest, now - self._began)
        self._turns += 1
        self._began = now

    def rest(self) -> None:
        """Be watched no longer, until the next turn: what comes now may take its time."""
        self._began = None

    def _watch_or_not(self) -> None:
        # The first process may hold the store itself, and be gone: then the others are about to leave too.
        with suppress(dist.DistError):
            self._watch()

    def _watch(self) -> None:
        world = self._world
        store = world.store.clone()
        host, number = socket.gethostname(), 0
        before: dict[int, Beat] | None = None
        os.set_blocking(self._signals, False)
        while not self._done.wait(self._tick):
            number += 1
            store.set(f"beat/{world.rank}", f"{number} {self._turns} {host}")
            began, now = self._began, time.monotonic()
            if began is None:
                before = None
                continue
            if self._was_told():
                self._told = self._told or now
                if now - max(self._told, began) > max(LEAVING, LONGER * self._longest):
                    self._leave(f"rank {world.rank} was told to stop, and the others do not answer")
            limit = max(self._seconds, LONGER * self._longest)
            if now - began < limit / 2:
                before = None
            elif before is None:
                before = self._beats(store)
            elif now - began > limit:
                self._judge(before, self._beats(store), now - began)

    def _was_told(self) -> bool:
        try:
            received = os.read(self._signals, 64)
        except BlockingIOError:
            received = b""
        return self._told is not None or bool(received)

    def _beats(self, store: Any) -> dict[int, Beat]:
        found = {}
        for rank in range(self._world.size):
            if store.check([f"beat/{rank}"]):
                number, turns, host = store.get(f"beat/{rank}").decode().split(" ", 2)
                found[rank] = Beat(int(number), int(turns), host)
        return found

    def _judge(self, before: dict[int, Beat], now: dict[int, Beat], seconds: float) -> None:
        """Say who is at fault, and leave."""
        silent = [rank for rank, beat in now.items() if rank in before and beat.number == before[rank].number]
        most = max(beat.turns for beat in now.values())
        behind = [rank for rank, beat in now.items() if beat.turns < most]
        at_fault = silent or behind
        if not at_fault:
            # Compiling, or a GPU or the network that stands still: NCCL's own time-out ends that.
            if self._world.is_first and not self._warned:
                sys.stderr.write(f"\nwarning: all {self._world.size} processes are in the same step, for {seconds:.0f} s by now\n")
            self._warned = True
            return
        names = ", ".join(f"rank {rank} on {now[rank].host}" for rank in at_fault)
        what = "is silent" if silent else f"has not come as far as the others ({most - now[at_fault[0]].turns} behind)"
        line = f"{names} {what}; the others have waited for {seconds:.0f} s"
        speaker = min((rank for rank in range(self._world.size) if rank not in at_fault), default=0)
        self._leave(line, say=self._world.rank == speaker)

    def _leave(self, line: str, *, say: bool = True) -> None:
        kept = self._flight_record()
        leave(f"{line}; all processes stop here" + (f" ({kept})" if kept else ""), say=say)

    def _flight_record(self) -> str:
        """Write NCCL's last collectives to a file, and return where it is; nothing where there is no NCCL."""
        if not torch.cuda.is_available():
            return ""
        try:
            record = torch._C._distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
            folder = self._folder / "flight_recorder"
            folder.mkdir(exist_ok=True)
            (folder / f"rank_{self._world.rank}").write_bytes(record)
        except (OSError, RuntimeError, AttributeError):
            return ""
        return f"the last collectives are in {folder}: torchfrtrace {folder} reads them"
