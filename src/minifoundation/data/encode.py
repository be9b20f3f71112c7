"""Text to token ids, a piece of the corpus at a time, in blocks that outlive the process that made them. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import uuid
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minifoundation.config import DataConfig
from minifoundation.data.pieces import Piece
from minifoundation.data.rows import Bad, documents
from minifoundation.data.shards import PART, Place, read_manifest
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.errors import UserError

BLOCK_BYTES = 8 * 1024 * 1024
"""Text in a block: what a killed worker loses at most, and what a worker holds in memory three times over."""


WORK = ".work"
"""The folder of the blocks, within that of the shards."""


@dataclass(frozen=True)
class Block:
    """Consecutive documents of a piece, encoded; those to train on and the held-out ones apart."""

    train: npt.NDArray[Any]
    """Ids of the documents to train on, each ``bos … eos``."""
    held_out: npt.NDArray[Any]
    tokens: npt.NDArray[np.int64]
    """Of each document, in their order."""
    text_bytes: npt.NDArray[np.int64]
    is_held_out: npt.NDArray[np.bool_]
    skipped: dict[str, int]
    """Rows that are no document, from the first document of this block to the first of the next, by reason."""
    last: bool
    """It is the last of its piece."""

    def write(self, path: Path) -> None:
        """Write the block whole or not at all; it is not flushed to disk, since ``read`` tells a damaged one."""
        notes = np.frombuffer(json.dumps([self.skipped, self.last]).encode(), np.uint8)
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PART}")  # a task that was taken for lost may still be writing its own
        try:
            with part.open("wb") as stream:
                np.savez(
                    stream,
                    train=self.train,
                    held_out=self.held_out,
                    tokens=self.tokens,
                    text_bytes=self.text_bytes,
                    is_held_out=self.is_held_out,
                    notes=notes,
                )
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    @classmethod
    def read(cls, path: Path) -> Block | None:
        """Return the block of ``path``; None when it is not there or is damaged."""
        try:
            with path.open("rb") as stream, np.load(stream) as arrays:  # compares the CRC of each array
                skipped, last = json.loads(arrays["notes"].tobytes())
                return cls(**{name: arrays[name] for name in arrays.files if name != "notes"}, skipped=skipped, last=last)
        except Exception:  # zipfile meets a flipped bit with a dozen kinds of error, NotImplementedError and RuntimeError among them
            return None


@dataclass(frozen=True)
class Encoding:
    """The task that makes the blocks of a piece in ``<folder>/.work``, those that are there already excepted.

    Args:
        folder: of the shards; what lies before the place in its manifest is not made again.
        threads: batches encoded at the same time, within the one process.
        removals: what ``dedup.removals`` wrote.
        block_bytes: text in a block, at least (BLOCK_BYTES, whatever it is where the task is made).
    """

    folder: Path
    config: DataConfig
    tokenizer: Path
    tokenizer_sha256: str
    dtype: str
    threads: int
    removals: Path | None
    block_bytes: int

    @property
    def work(self) -> Path:
        return self.folder / WORK

    def path(self, piece: int, block: int) -> Path:
        """Return where a block is kept."""
        return self.work / f"{piece:06d}-{block:04d}.npz"

    def __call__(self, number: int, piece: Piece) -> None:
        """Make the blocks of the piece.

        Raises:
            UserError: the piece cannot be read to its end, or the tokenizer's file has been replaced.
        """
        manifest = read_manifest(self.folder)
        place = manifest.place if manifest else Place()
        known = place.block if number == place.piece else 0
        while (block := Block.read(self.path(number, known))) is not None:
            if block.last:
                return
            known += 1
        tokenizer = _tokenizer(self.tokenizer, self.tokenizer_sha256)
        batches = self._batches(number, piece)
        turns = _Turns(enumerate(batches), threading.Lock(), threading.Semaphore(self.threads))
        with ThreadPoolExecutor(self.threads + 1) as pool:
            try:
                for each in [pool.submit(self._encode, number, known, tokenizer, turns) for _ in range(self.threads + 1)]:
                    each.result()
            finally:
                with turns.reading:
                    batches.close()

    def discard_before(self, place: Place) -> None:
        """Remove the blocks before ``place``, finished or not."""
        for path in self.work.iterdir():
            named = re.match(r"(\d+)-(\d+)\.", path.name)  # file systems have names of their own for files they cannot yet remove
            if named and (int(named[1]), int(named[2])) < (place.piece, place.block):
                path.unlink(missing_ok=True)

    def _encode(self, number: int, known: int, tokenizer: Tokenizer, turns: _Turns) -> None:
        """Make blocks until no batch is left: one thread reads while others encode, for which SentencePiece lets go of the interpreter."""
        while True:
            with turns.reading:
                index, batch = next(turns.batches, (0, None))
                if batch is None:
                    return
                turns.encoding.acquire()  # before another can read, so that blocks are begun in their order
            try:
                path = self.path(number, index)
                if index >= known and Block.read(path) is None:
                    self._block(tokenizer, batch).write(path)
            finally:
                turns.encoding.release()

    def _batches(self, number: int, piece: Piece) -> Generator[_Batch, None, None]:
        """Yield the documents of the piece by ``block_bytes`` of text; one batch at least."""
        skipped: Counter[str] = Counter()
        texts: list[str] = []
        raws: list[bytes] = []
        size = 0
        for text in self._documents(number, piece, skipped):
            if size >= self.block_bytes:
                yield _Batch(texts, raws, dict(skipped), last=False)
                texts, raws, size = [], [], 0
                skipped.clear()
            texts.append(text)
            raws.append(text.encode())
            size += len(raws[-1])
        yield _Batch(texts, raws, dict(skipped), last=True)

    def _documents(self, number: int, piece: Piece, skipped: Counter[str]) -> Iterator[str]:
        """Yield the documents that filters and de-duplication leave."""
        texts = kept_documents(piece, self.config, skipped)
        if self.removals is None:
            yield from texts
            return
        from minifoundation.data.dedup import dropped

        duplicates = dropped(self.removals, number)
        for index, text in enumerate(texts):
            if index in duplicates:
                skipped["duplicate"] += 1
            else:
                yield text

    def _block(self, tokenizer: Tokenizer, batch: _Batch) -> Block:
        encoded = tokenizer.encode_documents(batch.texts)
        held_out = [is_held_out(raw, self.config.held_out) for raw in batch.raws]
        return Block(
            train=self._joined(ids for ids, held in zip(encoded, held_out, strict=True) if not held),
            held_out=self._joined(ids for ids, held in zip(encoded, held_out, strict=True) if held),
            tokens=np.array([len(ids) for ids in encoded], np.int64),
            text_bytes=np.array([len(raw) for raw in batch.raws], np.int64),
            is_held_out=np.array(held_out, np.bool_),
            skipped=batch.skipped,
            last=batch.last,
        )

    def _joined(self, documents: Iterable[npt.NDArray[np.int32]]) -> npt.NDArray[Any]:
        return np.concatenate([np.zeros(0, np.int32), *documents], dtype=np.dtype(self.dtype).newbyteorder("<"), casting="unsafe")


class _Batch(NamedTuple):
    """The text of a block."""

    texts: list[str]
    raws: list[bytes]
    """The same in UTF-8."""
    skipped: dict[str, int]
    last: bool


class _Turns(NamedTuple):
    """What the threads of a task share."""

    batches: Iterator[tuple[int, _Batch]]
    reading: threading.Lock
    encoding: threading.Semaphore


def kept_documents(piece: Piece, config: DataConfig, skipped: Counter[str]) -> Iterator[str]:
    """Return the documents of a piece that pass ``data.filters``; what is left out is counted in ``skipped`` by reason.

    Raises:
        UserError: the piece cannot be read to its end.
    """
    texts = documents(piece, config, skipped)
    return filtered(texts, config, skipped) if config.filters else texts


def filtered(texts: Iterator[str], config: DataConfig, skipped: Counter[str]) -> Iterator[str]:
    """Yield the documents that pass ``data.filters``, as these leave them; what is left out is counted in ``skipped`` by reason."""
    from minifoundation.data.filters import quality_filter

    passed = quality_filter(config.filters)
    for text in texts:
        kept = passed(text)
        if isinstance(kept, Bad):
            skipped[kept.reason] += 1
        else:
            yield kept


def is_held_out(text: bytes, share: float) -> bool:
    """Return whether a document belongs to the held-out split: by its text alone, so equal documents are never on both sides."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") < share * 2**64


@lru_cache(maxsize=1)
def _tokenizer(path: Path, sha256: str) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    if tokenizer.sha256 != sha256:
        raise UserError(str(path), "was replaced while shards were made with it", "run the same command again")
    return tokenizer
