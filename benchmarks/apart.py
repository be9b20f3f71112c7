"""A measurement in a process of its own: nothing of one row is left for the next, and one that fails is a row that says so."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def context() -> Any:
    """Return where ``apart`` starts processes: from one that has imported torch once and never opened CUDA."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["torch"])
    return made


def apart(where: Any, measure: Callable[..., dict[str, Any]], *arguments: Any, seconds: float) -> dict[str, Any]:
    """Return the figures of ``measure(*arguments)``, run in a process of its own, or under "failed" what became of it."""
    mine, theirs = where.Pipe()
    process = where.Process(target=_child, args=(theirs, measure, *arguments))
    process.start()
    theirs.close()
    try:
        result: dict[str, Any] = mine.recv() if mine.poll(seconds) else {"failed": f"took longer than {seconds:.0f} s"}
    except EOFError:
        result = {"failed": "the process died"}
    process.kill()
    process.join()
    return result


def _child(pipe: Connection, measure: Callable[..., dict[str, Any]], *arguments: Any) -> None:
    try:
        pipe.send(measure(*arguments))
    except Exception as error:  # a row says what failed, and the next one runs
        pipe.send({"failed": f"{type(error).__name__}: {str(error)[:600]}"})
