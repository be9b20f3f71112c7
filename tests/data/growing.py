"""Folders of shards written by hand, all at once or one pair after the other."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from minifoundation.data.shards import Manifest, Pair, Place, Record, Shards, write_manifest


class Folder:
    """A folder whose shards are there in full but made known by ``grow``; no id occurs twice, so that each place can be recognised."""

    def __init__(self, folder: Path, train: list[int], held_out: list[int] | None = None, *, first_id: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        numbers = itertools.count(first_id)

        def made(name: str, lengths: list[int]) -> list[Record]:
            records = []
            for index, n in enumerate(lengths):
                file = f"{name}-{index:05d}.bin"
                np.array([next(numbers) for _ in range(n)], dtype="<u4").tofile(folder / file)
                records.append(Record(file=file, tokens=n, documents=1, text_bytes=3 * n, sha256=f"{name}{index}"))
            return records

        pairs = itertools.zip_longest(made("train", train), made("held_out", held_out or []))
        self.pairs = tuple(Pair(start=Place(), train=of_train, held_out=of_held_out) for of_train, of_held_out in pairs)

    def grow(self, pairs: int, *, complete: bool = False) -> Shards:
        """Have the manifest name the first ``pairs`` pairs."""
        write_manifest(
            self.folder,
            Manifest(dtype="uint32", tokenizer_sha256="t", source={}, settings={}, pairs=self.pairs[:pairs], complete=complete),
        )
        return Shards.open(self.folder)


def shards_of(folder: Path, train: list[int], held_out: list[int] | None = None, *, first_id: int = 0, complete: bool = True) -> Shards:
    """Return shards of the given lengths."""
    one = Folder(folder, train, held_out, first_id=first_id)
    return one.grow(len(one.pairs), complete=complete)
