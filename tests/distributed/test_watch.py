"""Who is at fault when a step does not end, told from what the processes say of themselves."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from minifoundation.distributed import Watch, World

SECONDS = 0.4


class Store:
    """torchrun's table, in memory; what the other processes say is written by the test."""

    def __init__(self, **beats: str) -> None:
        self.values = {f"beat/{rank[1:]}": beat for rank, beat in beats.items()}

    def clone(self) -> Store:
        return self

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def get(self, key: str) -> bytes:
        return self.values[key].encode()


class Living(Store):
    """The others go on talking: the number of their beat goes up with each look."""

    def get(self, key: str) -> bytes:
        number, rest = self.values[key].split(" ", 1)
        self.values[key] = f"{int(number) + 1} {rest}"
        return super().get(key)


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes with which the watch has left, without leaving."""
    codes: list[int] = []
    monkeypatch.setattr("os._exit", codes.append)
    return codes


def stood_still(store: Store, folder: Path, left: list[int], *, turns: int = 3, seconds: float = 4 * SECONDS) -> None:
    with Watch(World(0, 3, 0, 3, store=store), SECONDS, folder).watching() as watched:
        for _ in range(turns):
            watched.turn()
        began = time.monotonic()
        while not left and time.monotonic() - began < seconds:
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("store", "message"),
    [
        (
            Living(r1="1 3 here", r2="1 2 there"),
            "error: rank 2 on there has not come as far as the others (1 behind); the others have waited",
        ),
        (Store(r1="1 3 here", r2="1 3 there"), "error: rank 1 on here, rank 2 on there is silent; the others have waited"),
    ],
)
def test_who_is_at_fault(tmp_path: Path, left: list[int], capsys: pytest.CaptureFixture[str], store: Store, message: str) -> None:
    stood_still(store, tmp_path, left)
    assert set(left) == {1}
    assert message in capsys.readouterr().err


def test_a_process_that_is_behind_itself_lets_another_one_say_so(
    tmp_path: Path, left: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    stood_still(Living(r1="1 9 here", r2="1 9 there"), tmp_path, left)
    assert set(left) == {1} and capsys.readouterr().err == ""


def test_nobody_is_blamed_who_is_as_far_as_the_others(tmp_path: Path, left: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    stood_still(Living(r1="1 3 here", r2="1 3 there"), tmp_path, left)
    assert left == [] and "all 3 processes are in the same" in capsys.readouterr().err


def test_work_that_may_take_long_is_not_watched(tmp_path: Path, left: list[int]) -> None:
    with Watch(World(0, 3, 0, 3, store=Store(r1="1 3 here", r2="1 3 there")), SECONDS, tmp_path).watching() as watched:
        watched.turn()
        watched.rest()
        time.sleep(2 * SECONDS)
    assert left == []


def test_one_process_needs_no_watch(tmp_path: Path) -> None:
    with Watch(World(), SECONDS, tmp_path).watching() as watched:
        watched.turn()
