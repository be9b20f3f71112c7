"""The engine of several processes that torchrun has started: pieces go by the table of keys and values that these share.

The first process puts the pieces into the table in their order; every process, the first one too, takes the next as soon as it can do it.
Nothing else is sent: blocks go by the folder of the shards, which all have to see.
"""

from __future__ import annotations

import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Protocol

from minifoundation.data.engines import Task, local, portable, settle
from minifoundation.data.pieces import Piece

POLL_SECONDS = 0.05
BEAT_SECONDS = 1.0
SILENT_SECONDS = 60.0
"""A process that has not come round for so long counts as lost."""

WITHDRAWN = b""

Lost = Callable[[str], object]


class Table(Protocol):
    """What is used of ``torch.distributed.Store``."""

    def set(self, key: str, value: bytes, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def check(self, keys: list[str], /) -> bool: ...
    def delete_key(self, key: str, /) -> bool: ...


class _Beats:
    """Looks whether processes still come round.

    Args:
        lost: is called with a line about one that has not for ``SILENT_SECONDS``; it ends this one.
    """

    def __init__(self, table: Table, ranks: Iterable[int], lost: Lost) -> None:
        self._table = table
        self._lost = lost
        self._looked = time.monotonic()
        self._seen = dict.fromkeys(ranks, (0, self._looked))

    def look(self) -> None:
        """Look again, if it is time."""
        moment = time.monotonic()
        if moment - self._looked < BEAT_SECONDS:
            return
        self._looked = moment
        for rank, (before, since) in self._seen.items():
            now = self._table.add(f"pieces/beat/{rank}", 0)
            if now != before:
                self._seen[rank] = now, moment
            elif moment - since > SILENT_SECONDS:
                host = self._table.get(f"pieces/host/{rank}").decode()
                self._lost(
                    f"rank {rank} on {host} has been silent for {SILENT_SECONDS:.0f} s; the same command continues after what is done"
                )


class Helper:
    """Takes pieces from the table and does them in ``workers`` processes of this machine."""

    def __init__(self, table: Table, rank: int, workers: int) -> None:
        self._table = table
        self._rank = rank
        self._at_once = workers + 1  # one waits, so that no process does while the table is asked
        self._engine = local(workers)
        self._place: int | None = None
        self._running: dict[int, Future[None]] = {}
        self._beaten = 0.0
        table.set(f"pieces/host/{rank}", socket.gethostname().encode())

    def serve(self, lost: Lost) -> None:
        """Do what comes until the first process says that it is over; ``lost`` is told when that one is."""
        first = _Beats(self._table, [0], lost)
        while not self._table.check(["pieces/over"]):
            first.look()
            if not self.turn():
                time.sleep(POLL_SECONDS)

    def turn(self) -> bool:
        """Hand back what is done, take a piece if there is one, and return whether there was either."""
        if time.monotonic() - self._beaten >= BEAT_SECONDS:
            self._table.add(f"pieces/beat/{self._rank}", 1)
            self._beaten = time.monotonic()
        ended = [place for place, future in self._running.items() if future.done()]
        for place in ended:
            error = self._running.pop(place).exception()
            outcome = pickle.dumps((place, portable(error) if isinstance(error, Exception) else None))
            self._table.set(f"pieces/outcome/{self._table.add('pieces/outcomes', 1) - 1}", outcome)
        return self._take() or bool(ended)

    def close(self) -> None:
        """Stop at once, whatever is still in work."""
        self._engine.close()

    def _take(self) -> bool:
        if len(self._running) >= self._at_once:
            return False
        if self._place is None:
            self._place = self._table.add("pieces/taken", 1) - 1
        key = f"pieces/piece/{self._place}"
        if not self._table.check([key]):
            return False
        given = self._table.get(key)
        self._table.delete_key(key)
        if given != WITHDRAWN:
            task, number, piece = pickle.loads(given)
            (self._running[self._place],) = self._engine.submit(task, [(number, piece)])
        self._place = None
        return True


class Leader:
    """The engine (``engines.Engine``) of the first process, whose own helper it keeps going.

    Args:
        ahead: pieces worth having in work at once.
        ranks: how many processes there are.
        lost: is told of a process that is silent.
    """

    def __init__(self, table: Table, helper: Helper, *, ahead: int, ranks: int, lost: Lost) -> None:
        self.ahead = ahead
        self._table = table
        self._helper = helper
        self._others = _Beats(table, range(1, ranks), lost)
        self._waiting: dict[int, Future[None]] = {}
        self._places = 0
        self._outcomes = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._going_or_not, daemon=True)
        self._thread.start()

    def submit(self, task: Task, pieces: Iterable[tuple[int, Piece]]) -> list[Future[None]]:
        futures: list[Future[None]] = []
        for number, piece in pieces:
            futures.append(Future())
            with self._lock:
                self._waiting[self._places] = futures[-1]
            self._table.set(f"pieces/piece/{self._places}", pickle.dumps((task, number, piece)))
            self._places += 1
        return futures

    def close(self) -> None:
        self._table.set("pieces/over", b"over")
        self._closed.set()
        self._thread.join()

    def _going_or_not(self) -> None:
        try:
            self._going()
        except Exception as error:  # the table is gone: nothing will be handed back any more
            with self._lock:
                for future in self._waiting.values():
                    settle(future, error)

    def _going(self) -> None:
        while not self._closed.is_set():
            busy = self._helper.turn()
            self._hand_over()
            self._others.look()
            if not busy:
                self._closed.wait(POLL_SECONDS)

    def _hand_over(self) -> None:
        """Give futures their outcomes, and take back from the table what nobody waits for any more."""
        while self._table.check([key := f"pieces/outcome/{self._outcomes}"]):
            place, error = pickle.loads(self._table.get(key))
            self._table.delete_key(key)
            self._outcomes += 1
            with self._lock:
                future = self._waiting.pop(place, None)
            if future is not None:
                settle(future, error)
        with self._lock:
            unwanted = [place for place, future in self._waiting.items() if future.cancelled()]
            for place in unwanted:
                del self._waiting[place]
        for key in (f"pieces/piece/{place}" for place in unwanted):
            if self._table.check([key]):  # nobody has taken it yet
                self._table.set(key, WITHDRAWN)
