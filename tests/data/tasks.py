"""What engines are given to do in tests; loaded by every worker process, and so without pytest."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from minifoundation.data.engines import Engine, Task
from minifoundation.data.pieces import Piece, Span
from minifoundation.data.sources import File
from minifoundation.errors import UserError

PIECE: Piece = (Span(File("a.jsonl", "a.jsonl", 10), 0, 10),)


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@dataclass(frozen=True)
class Noted:
    """A task that first writes down where it runs and takes its time; fails or dies for one number, once or always.

    Args:
        processes: it goes on when so many have begun a task, however slowly they start.
    """

    folder: Path
    task: Task | None = None
    seconds: float = 0
    fails: int | None = None
    dies: int | None = None
    dies_once: int | None = None
    processes: int = 1

    def __call__(self, number: int, piece: Piece) -> None:
        with (self.folder / f"{number}").open("a") as file:
            file.write(f"{os.getpid()} {Path.cwd()} {_ray_node()}\n")
        time.sleep(self.seconds)
        if self.processes > 1:
            until(lambda: len({pid for number in self.runs() for pid in self.pids(number)}) >= self.processes)
        if number == self.fails:
            raise UserError("a.jsonl", "is broken", "mend it")
        if number == self.dies or (number == self.dies_once and len(self.pids(number)) == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.task is not None:
            self.task(number, piece)

    def runs(self) -> dict[int, list[list[str]]]:
        """Return for each number that was begun its runs: process, working folder, node."""
        return {int(path.name): [line.split() for line in path.read_text().splitlines()] for path in self.folder.iterdir()}

    def pids(self, number: int) -> list[int]:
        """Return the process of each run of ``number``."""
        return [int(process) for process, *_ in self.runs().get(number, [])]


def _ray_node() -> str:
    ray = sys.modules.get("ray")
    return ray.get_runtime_context().get_node_id() if ray and ray.is_initialized() else "none"


@dataclass
class Slowed:
    """An engine that does every task in the way of ``noted``."""

    engine: Engine
    noted: Noted

    def __post_init__(self) -> None:
        self.ahead = self.engine.ahead

    def submit(self, task: Task, pieces: Iterable[tuple[int, Piece]]) -> list[Future[None]]:
        return self.engine.submit(replace(self.noted, task=task), pieces)

    def close(self) -> None:
        self.engine.close()
