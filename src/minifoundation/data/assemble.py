"""Blocks to shards: documents in the order of the corpus, cut at document ends, whatever the order the blocks were made in."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from minifoundation.config import DataConfig
from minifoundation.data.encode import Block, Encoding
from minifoundation.data.engines import Engine
from minifoundation.data.pieces import Piece, after
from minifoundation.data.rows import no_documents
from minifoundation.data.shards import Manifest, Pair, Place, ShardWriter, write_manifest
from minifoundation.data.sources import Corpus, File
from minifoundation.errors import UserError

POLL_SECONDS = 0.05
SILENT_SECONDS = 1.0
"""Waiting for longer than this is shown."""
VISIBLE_SECONDS = 10.0
"""What another machine has written may take so long to appear on a network file system."""

ATTEMPTS = 3
"""A piece that is done, and of which a block is damaged or does not appear, is submitted this often."""


@dataclass(frozen=True)
class Placed:
    """A block, the place of its first document that is still to be taken, and the place after its last."""

    block: Block
    place: Place
    after: Place


def blocks(
    encoding: Encoding, pieces: Iterator[Piece], start: Place, files: Sequence[File], engine: Engine, bar: tqdm[Any]
) -> Iterator[Placed]:
    """Yield each block in the order of the corpus from ``start`` on; only the first place can be within a block.

    The blocks of a piece are taken as soon as they are there, while the rest of it and pieces after it are still in work.

    Args:
        pieces: those from number ``start.piece`` on.
        files: all of the corpus.
        bar: tells what is being waited for.

    Raises:
        UserError, OSError: the error of a piece, when it is its turn.
    """
    numbers = {file.url: number for number, file in enumerate(files)}
    numbered = enumerate(pieces, start.piece)
    work: deque[_InWork] = deque()
    place = start
    try:
        while True:
            if len(work) <= engine.ahead // 2:
                more: list[tuple[int, Piece]] = []
                futures = engine.submit(encoding, _noted(islice(numbered, engine.ahead - len(work)), more))
                work += [_InWork(number, piece, future) for (number, piece), future in zip(more, futures, strict=True)]
            if not work:
                return
            first = work[0]
            while place.piece == first.number:
                block = _ready(encoding, first, place.block, engine, bar)
                if block.last:
                    file, begin = after(first.piece, numbers)
                    following = Place(piece=place.piece + 1, file=file, start=begin)
                else:
                    following = place.model_copy(update={"block": place.block + 1, "document": 0})
                yield Placed(block, place, following)
                place = following
            work.popleft()
    finally:
        for each in work:
            each.future.cancel()


def _noted(pieces: Iterable[tuple[int, Piece]], into: list[tuple[int, Piece]]) -> Iterator[tuple[int, Piece]]:
    for piece in pieces:
        into.append(piece)
        yield piece


@dataclass
class _InWork:
    number: int
    piece: Piece
    future: Future[None]


def _ready(encoding: Encoding, work: _InWork, index: int, engine: Engine, bar: tqdm[Any]) -> Block:
    """Wait until the block is there, and return it."""
    path = encoding.path(work.number, index)
    began = time.monotonic()
    told = False
    for _ in range(ATTEMPTS):
        patience = math.inf
        while time.monotonic() < patience:
            done = work.future.done()  # asked before the block is looked for, which may come in between
            if (block := Block.read(path)) is not None:
                if told:
                    bar.set_postfix_str("")
                return block
            if done:
                work.future.result()
                patience = 0 if path.exists() else min(patience, time.monotonic() + VISIBLE_SECONDS)
                time.sleep(POLL_SECONDS)
            else:
                wait([work.future], POLL_SECONDS)
            if not told and time.monotonic() - began > SILENT_SECONDS:
                told = True
                bar.set_postfix_str(f"waiting for {work.piece[0].file.name}")
        (work.future,) = engine.submit(encoding, [(work.number, work.piece)])
    raise UserError(
        str(path), f"is not there or damaged, though it was made {ATTEMPTS} times", "check the disk, and that all machines share it"
    )


def manifests(
    folder: Path, manifest: Manifest, encoded: Iterable[Placed], corpus: Corpus, config: DataConfig, bar: tqdm[Any]
) -> Iterator[Manifest]:
    """Write the documents of the blocks to pairs of shards, and yield the folder's new manifest after each pair and at the end.

    Args:
        encoded: those from ``manifest.place`` on, to the end of the corpus.
        bar: counts training tokens.

    Raises:
        UserError: the corpus holds no document.
    """
    place = manifest.place
    writing = _Writing(folder, manifest, config)
    try:
        for placed in encoded:
            block, document = placed.block, placed.place.document
            while True:
                document = writing.taken(block, document)
                within = document < len(block.tokens)
                place = placed.place.model_copy(update={"document": document}) if within else placed.after
                bar.update(manifest.train_tokens + writing.train.tokens - bar.n)
                if writing.full:
                    manifest = writing.commit(place)
                    yield manifest
                    writing = _Writing(folder, manifest, config)
                if not within:
                    break
        if not writing.documents_read:
            raise no_documents(corpus, config, writing.skipped)
        yield writing.commit(place, complete=True)
    finally:
        writing.discard()


class _Writing:
    """The pair that is being written, beside the manifest of those that are complete."""

    def __init__(self, folder: Path, manifest: Manifest, config: DataConfig) -> None:
        self._folder = folder
        self._manifest = manifest
        self._config = config
        self._dropped = manifest.held_out_dropped
        self.documents_read = manifest.documents_read
        self.skipped = Counter(manifest.skipped)
        number = len(manifest.pairs)
        self.train = ShardWriter(folder / f"train-{number:05d}.bin", manifest.dtype)
        self._held_out = ShardWriter(folder / f"held_out-{number:05d}.bin", manifest.dtype)

    @property
    def full(self) -> bool:
        return self.train.tokens >= self._config.shard_tokens

    def taken(self, block: Block, first: int) -> int:
        """Take documents of the block from number ``first`` on, until it ends or the shard is full; return the number of the next one."""
        held = block.is_held_out
        train_ends = np.cumsum(np.where(held, 0, block.tokens))
        held_ends = np.cumsum(np.where(held, block.tokens, 0))
        train_start, held_start = (int(train_ends[first - 1]), int(held_ends[first - 1])) if first else (0, 0)
        filling = int(np.searchsorted(train_ends, train_start + self._config.shard_tokens - self.train.tokens))
        stop = min(filling + 1, len(held))
        if stop > first:
            here = slice(first, stop)
            trained = ~held[here]
            self.train.add(block.train[train_start : train_ends[stop - 1]], int(block.text_bytes[here][trained].sum()), int(trained.sum()))
            sizes = block.tokens[here][~trained]
            room = self._config.held_out_tokens - self._manifest.held_out_tokens - self._held_out.tokens
            kept = int(np.sum(np.cumsum(sizes) - sizes < room))
            self._held_out.add(
                block.held_out[held_start : held_start + int(sizes[:kept].sum())],
                int(block.text_bytes[here][~trained][:kept].sum()),
                kept,
            )
            self._dropped += len(sizes) - kept
            self.documents_read += stop - first
        if stop == len(held):
            self.skipped.update(block.skipped)
        return stop

    def commit(self, place: Place, *, complete: bool = False) -> Manifest:
        """Make the pair part of the folder and return the new manifest."""
        old = self._manifest
        pair = Pair(start=old.place, train=self.train.finish(), held_out=self._held_out.finish())
        manifest = old.model_copy(
            update={
                "pairs": (*old.pairs, pair) if pair.records else old.pairs,
                "place": place,
                "documents_read": self.documents_read,
                "held_out_dropped": self._dropped,
                "skipped": dict(self.skipped),
                "complete": complete,
            }
        )
        write_manifest(self._folder, manifest)
        return manifest

    def discard(self) -> None:
        """Leave nothing behind of what was not committed."""
        self.train.discard()
        self._held_out.discard()
