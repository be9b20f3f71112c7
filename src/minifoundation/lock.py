"""One process at a time in a folder: a lock that the system gives back when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from minifoundation.errors import UserError

LOCK = ".lock"
POLL_SECONDS = 0.3


@contextmanager
def held(folder: Path, suffices: Callable[[], bool] | None = None) -> Iterator[bool]:
    """Hold the lock of ``folder``, which is made, with those above it, and removed again where nothing has come into it.

    A lock file that a killed process has left is of no account: the lock is the system's.

    Args:
        suffices: while another process holds it, wait until this is true, and then go on without the lock (False). Without it
            do not wait.

    Raises:
        UserError: another process holds it, which is named; the file system has no locks.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    while (lock := _locked(folder, made)) is None:
        if suffices is None:
            remedy = "wait until it is done, then run the same command again"
            raise UserError(str(folder), f"is being written by another process ({_owner(folder)})", remedy)
        if suffices():
            yield False
            return
        time.sleep(POLL_SECONDS)
    with lock:
        try:
            yield True
        finally:
            _remove(folder, made)


def _remove(folder: Path, made: list[Path]) -> None:
    """Remove the folders that were ``made`` where nothing but the lock has come into them."""
    with suppress(OSError):  # the folder was moved, or others have begun to use one above it
        if made and [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            for place in made:
                place.rmdir()


def _locked(folder: Path, made: list[Path]) -> IO[str] | None:
    """Return the lock of ``folder``, held until it is closed; None while another process holds it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as closed:
            lock = closed.enter_context((folder / LOCK).open("a+"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            except OSError as error:
                remedy = "give a folder on a file system that has locks (Lustre has them when mounted with -o flock)"
                raise UserError(str(folder), f"cannot be locked ({str(error.strerror).lower()})", remedy) from None
            if _lies_there(lock, folder / LOCK):  # else its last holder has removed it with the folder
                try:
                    lock.truncate(0)
                    os.write(lock.fileno(), f"pid {os.getpid()} on {socket.gethostname()}".encode())  # no buffer that closing would write
                except OSError as error:
                    error.filename = str(folder / LOCK)
                    _remove(folder, made)
                    raise
                closed.pop_all()
                return lock


def _lies_there(file: IO[str], path: Path) -> bool:
    """Return whether an open ``file`` is the one that ``path`` names."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def holder(folder: Path) -> str | None:
    """Return which process holds the lock of ``folder``, None when none does."""
    try:
        with (folder / LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _owner(folder)
    except OSError:  # there is none, or no such thing as a lock
        return None
    return None


def _owner(folder: Path) -> str:
    try:
        return (folder / LOCK).read_text(encoding="utf-8")
    except FileNotFoundError:
        return "which has just ended"
