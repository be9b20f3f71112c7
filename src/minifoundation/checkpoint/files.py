"""Files that are written whole or not at all, and hashed on their way to the disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Lock, Thread
from types import TracebackType
from typing import Any, Self

SEGMENT = 256 * 2**20
"""Bytes of a file that have a hash of their own, so that several threads write, read and hash at once: one hashes a gigabyte a second."""

BLOCK = 32 * 2**20
"""Bytes that are written, read or hashed at a time; all three leave the interpreter to other threads meanwhile."""

WORKERS = 4
"""Threads that a file is written or read by: more do not make a disk faster."""


@dataclass(frozen=True)
class Record:
    """What a manifest says of one file: its size, and the sha256 of each of its segments."""

    bytes: int
    sha256: tuple[str, ...]

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Record:
        """Return the record that ``asdict`` and JSON have made ``entry`` of."""
        return cls(entry["bytes"], tuple(entry["sha256"]))


class HashedFile:
    """A file being written whose sha256 is taken from what passes, not by reading it again.

    Leaving the context makes the file durable; ``record`` is known from then on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: Record | None = None
        self._bytes = 0
        self._hashes: list[Any] = []
        self._file = path.open("wb", buffering=0)

    def write(self, data: Any) -> int:
        """Append bytes, or anything that gives a contiguous buffer of them."""
        view = memoryview(data).cast("B")
        end = self._bytes + len(view)
        while len(self._hashes) * SEGMENT < end:
            self._hashes.append(hashlib.sha256())
        try:
            _in_threads(lambda part: self._write_part(view, *part), _segments(self._bytes, end))
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise
        self._bytes = end
        return len(view)

    def _write_part(self, view: memoryview, first: int, end: int) -> None:
        """Write and hash the bytes of the file from ``first`` to ``end``, which lie in one segment; ``view`` begins where the file ends."""
        hashed = self._hashes[first // SEGMENT]
        while first < end:
            block = view[first - self._bytes : min(end, first + BLOCK) - self._bytes]
            hashed.update(block)
            first += len(block)
            while block:
                block = block[os.pwrite(self._file.fileno(), block, first - len(block)) :]

    def flush(self) -> None:
        """Do nothing: there is no buffer (``torch.save`` asks)."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                _fsync(self._file.fileno(), self.path)
                self.record = Record(self._bytes, tuple(hashed.hexdigest() for hashed in self._hashes))
        finally:
            self._file.close()


def _segments(first: int, end: int) -> list[tuple[int, int]]:
    """Return the bytes from ``first`` to ``end`` of a file cut where segments begin."""
    cuts = [first, *range((first // SEGMENT + 1) * SEGMENT, end, SEGMENT), end]
    return list(pairwise(cuts)) if end > first else []


def _in_threads(work: Callable[[tuple[int, int]], None], parts: Sequence[tuple[int, int]]) -> None:
    """Do ``work`` on every part, several at once; raise what one of them raised, when none is at work any more.

    The threads are daemons, so that a process which has to leave at once does not wait for them.
    """
    left, lock, errors = iter(parts), Lock(), list[BaseException]()

    def worker() -> None:
        while not errors:
            with lock:
                part = next(left, None)
            if part is None:
                return
            try:
                work(part)
            except BaseException as error:
                errors.append(error)

    threads = [Thread(target=worker, name="file", daemon=True) for _ in range(min(WORKERS, len(parts)) - 1)]
    for thread in threads:
        thread.start()
    worker()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt as stop:  # who called closes the file next, and nobody may be at work on it then
        errors.append(stop)
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all; its folder is not made, for one that has vanished is a fault."""
    part = path.with_name(path.name + ".part")
    try:
        with HashedFile(part) as out:
            out.write(content)
        put(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def put(part: Path, place: Path) -> None:
    """Rename ``part`` to ``place`` and make the new name durable too: what it replaces may be removed after this."""
    part.replace(place)
    sync_folder(place.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _fsync(descriptor, folder)
    finally:
        os.close(descriptor)


def record_of(path: Path) -> Record:
    """Return the record of a file that is there; reads all of it."""
    size = path.stat().st_size
    digests = [""] * -(-size // SEGMENT)
    with path.open("rb", buffering=0) as file:

        def read(part: tuple[int, int]) -> None:
            first, end = part
            hashed, buffer = hashlib.sha256(), memoryview(bytearray(min(BLOCK, end - first)))
            while first < end:
                count = os.preadv(file.fileno(), [buffer[: end - first]], first)
                if not count:
                    break  # cut short meanwhile: the hash will not be the one that is expected
                hashed.update(buffer[:count])
                first += count
            digests[part[0] // SEGMENT] = hashed.hexdigest()

        _in_threads(read, _segments(0, size))
    return Record(size, tuple(digests))


def _fsync(descriptor: int, path: Path) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
