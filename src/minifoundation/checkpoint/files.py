"""Files that are written whole or not at all, and hashed on their way to the disk."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

BLOCK = 128 * 2**20
"""Bytes that are written at a time: between two the interpreter is asked for, and a busy one lets a thread wait for milliseconds."""

SMALL = 2**16
"""What is less is not worth handing to another thread."""


@dataclass(frozen=True)
class Record:
    """What a manifest says of one file."""

    bytes: int
    sha256: str


class HashedFile:
    """A file being written whose sha256 is taken from what passes, by a thread beside the writing, not by reading it again.

    Leaving the context makes the file durable; ``record`` is known from then on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: Record | None = None
        self._bytes = 0
        self._sha256 = hashlib.sha256()
        self._file = path.open("wb", buffering=0)
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="sha256")

    def write(self, data: Any) -> int:
        """Append bytes, or anything that gives a contiguous buffer of them."""
        view = memoryview(data).cast("B")
        if len(view) < SMALL:
            self._sha256.update(view)
            self._write_all(view)
        else:  # all of it at once: the hash never waits for the interpreter, which training has
            hashed = self._hasher.submit(self._sha256.update, view)
            try:
                self._write_all(view)
            finally:
                hashed.result()
        self._bytes += len(view)
        return len(view)

    def _write_all(self, view: memoryview) -> None:
        try:
            while view:
                view = view[self._file.write(view[:BLOCK]) or 0 :]
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise

    def flush(self) -> None:
        """Do nothing: there is no buffer (``torch.save`` asks)."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                _fsync(self._file.fileno(), self.path)
                self.record = Record(self._bytes, self._sha256.hexdigest())
        finally:
            self._hasher.shutdown()
            self._file.close()


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all, in a folder that is made when it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
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
    with path.open("rb") as file:
        return Record(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _fsync(descriptor: int, path: Path) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
