"""Several processes that share a table: here threads, each with worker processes of its own."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest

from minifoundation.config import DataConfig
from minifoundation.data import ranks
from minifoundation.data.ranks import Helper, Leader
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.errors import UserError
from tests.data.prepared import files, prepared
from tests.data.tasks import PIECE, Noted, Slowed, until


class Table:
    """A table of keys and values; with ``broken`` it is gone, as that of a process that has died."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.broken = False
        self._lock = threading.RLock()

    def set(self, key: str, value: bytes, /) -> None:
        with self._lock:
            self.values[key] = value

    def get(self, key: str, /) -> bytes:
        return self.values[key]

    def add(self, key: str, amount: int, /) -> int:
        with self._lock:
            total = int(self.values.get(key, b"0")) + amount
            self.values[key] = str(total).encode()
            return total

    def check(self, keys: list[str], /) -> bool:
        if self.broken:
            raise ConnectionError("the table is gone")
        return all(key in self.values for key in keys)

    def delete_key(self, key: str, /) -> bool:
        with self._lock:
            return self.values.pop(key, None) is not None

    def names(self) -> list[str]:
        with self._lock:
            return list(self.values)


@contextmanager
def processes(table: Table, count: int, lost: list[str]) -> Iterator[Leader]:
    """Give the engine of the first of several processes, the others of which serve it."""
    with ExitStack() as opened:
        helpers = [opened.enter_context(closing(Helper(table, rank, 1))) for rank in range(count)]
        threads = [threading.Thread(target=helper.serve, args=(lost.append,)) for helper in helpers[1:]]
        for thread in threads:
            thread.start()
        try:
            with closing(Leader(table, helpers[0], ahead=3 * count, ranks=count, lost=lost.append)) as leader:
                yield leader
        finally:
            for thread in threads:
                thread.join()


@pytest.fixture
def noted(tmp_path: Path) -> Noted:
    folder = tmp_path / "noted"
    folder.mkdir()
    return Noted(folder)


def test_shards_of_several_processes_are_those_of_one(
    data: DataConfig, tokenizer: Tokenizer, noted: Noted, tmp_path: Path, small_pieces: None
) -> None:
    alone = files(prepared(data.model_copy(update={"shards_dir": tmp_path / "alone"}), tokenizer).folder)
    table, lost = Table(), list[str]()
    with processes(table, 2, lost) as engine:
        slowed = Slowed(engine, Noted(noted.folder, processes=2))
        assert prepared(data, tokenizer, tokens=5000, engine=slowed).train_tokens >= 5000
        assert files(prepared(data, tokenizer, engine=slowed).folder) == alone
        # Pieces that only the first call had wanted may still be in work: their outcomes are read as they come, until the engine is closed.
        until(lambda: not [key for key in table.names() if key.startswith("pieces/outcome/")])
    assert len({pid for number in noted.runs() for pid in noted.pids(number)}) == 2 and lost == []


def test_an_error_comes_back_and_what_nobody_wants_is_not_begun(noted: Noted) -> None:
    with processes(Table(), 2, []) as engine:
        slow = Noted(noted.folder, seconds=0.5, fails=1)
        futures = engine.submit(slow, [(number, PIECE) for number in range(12)])
        for future in futures[6:]:
            future.cancel()
        with pytest.raises(UserError, match=r"^a\.jsonl: is broken; mend it$"):
            futures.pop(1).result(30)
        (after,) = engine.submit(noted, [(99, PIECE)])
        assert [future.result(30) for future in (*futures[:5], after)] == [None] * 6
    assert set(noted.runs()) == {*range(6), 99}


def test_a_process_that_does_not_come_round_is_named(noted: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(ranks, "SILENT_SECONDS", 1.0)
    table, lost = Table(), list[str]()
    with closing(Helper(table, 0, 1)) as mine, closing(Helper(table, 1, 1)) as other:
        other.turn()
        with closing(Leader(table, mine, ahead=6, ranks=2, lost=lost.append)):
            until(lambda: lost)
        assert lost[0].startswith("rank 1 on ") and "has been silent for 1 s; the same command continues after what is done" in lost[0]
    lost.clear()
    table.delete_key("pieces/over")
    with closing(Helper(table, 1, 1)) as other, pytest.raises(SystemExit):  # the first one is gone
        other.serve(lambda line: sys.exit(line) if line.startswith("rank 0 on ") else None)


def test_without_the_table_nothing_is_waited_for(noted: Noted) -> None:
    table = Table()
    with closing(Helper(table, 0, 1)) as helper:
        leader = Leader(table, helper, ahead=3, ranks=1, lost=print)
        (future,) = leader.submit(Noted(noted.folder, seconds=600), [(0, PIECE)])
        until(lambda: noted.runs())
        table.broken = True
        with pytest.raises(ConnectionError, match="the table is gone"):
            future.result(30)
        table.broken = False
        began = time.monotonic()
        leader.close()
    assert time.monotonic() - began < 60 and isinstance(future, Future)
