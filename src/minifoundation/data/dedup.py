"""Documents that are equal to an earlier one, or much like it: found in a pass over the whole corpus before anything is encoded.

Each document gets keys, such that two of a kind share one: exact has one key, a hash of the text; minhash has one for each of
datatrove's 14 bands of 8 minimal hashes of 5-grams. The task of a piece writes the keys of its documents, sorted. Then one task for
each range of each band's keys finds those that occur more than once, and at the end whatever is linked is one cluster, of which the
first document stays.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import uuid
from array import array
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from minifoundation.config import DataConfig
from minifoundation.data.encode import kept_documents
from minifoundation.data.engines import Engine
from minifoundation.data.filters import LONG_RUN, require_datatrove
from minifoundation.data.pieces import PIECE_BYTES, Piece, pieces
from minifoundation.data.shards import PART
from minifoundation.data.sources import Corpus

if TYPE_CHECKING:
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature

KEYS_AT_ONCE = 16 * 1024 * 1024
"""Keys that one task compares, about: 1.1 GB of memory."""

SHINGLES_AT_ONCE = 8192
"""5-grams whose 112 hashes are held at once: 22 MB, where a document of 4 MB would take 2 GB."""

Array = npt.NDArray[np.uint64]


def removals(corpus: Corpus, config: DataConfig, engine: Engine, work: Path, *, show_progress: bool = True) -> Path:
    """Return the file that says which documents ``data.dedup`` drops; make it if it is not there.

    It is the same for any engine and any number of workers. What finished tasks have written stays until the file is there, so
    a run that was killed goes on after them.

    Disk: 16 bytes a document, 224 with minhash. Memory: of a task, that for the documents of its piece or 1.1 GB, whichever is
    more; here, at the end, about 100 bytes for each link that was found between two documents.

    A hash of 64 bits stands for the text, or for the 8 hashes of a band: of n documents that all differ, n² / 2^65 are expected
    to be dropped by accident, 0.03 of a billion (14 times that with minhash).

    Args:
        work: a folder that all processes of the engine share.

    Raises:
        UserError: a piece cannot be read to its end; datatrove or spaCy is not installed.
    """
    if config.dedup == "minhash":
        require_datatrove("data.dedup", config.dedup)
    folder = work / f"dedup-{_digest(corpus, config)}"
    path = folder / "removals.npy"
    signatures, linked = folder / "signatures", folder / "links"
    if not path.exists():
        signatures.mkdir(parents=True, exist_ok=True)
        linked.mkdir(exist_ok=True)
        signing = Signatures(signatures, config)
        count = _run(engine, signing, enumerate(pieces(corpus, config)), show_progress)
        documents = sum(len(np.load(signing.path(number), mmap_mode="r")[0, 0]) for number in range(count))
        linking = Links(linked, signing, count, ranges=math.ceil(documents / KEYS_AT_ONCE))
        count = _run(engine, linking, ((number, ()) for number in range(bands(config) * linking.ranges)), show_progress)
        _write(path, _followers([np.load(linking.path(number)) for number in range(count)]))
    for made in (signatures, linked):
        shutil.rmtree(made, ignore_errors=True)
    return path


def dropped(path: Path, number: int) -> set[int]:
    """Return which documents of piece ``number`` are dropped, counted among those that rows and ``data.filters`` leave."""
    places = np.load(path, mmap_mode="r")
    first, end = np.searchsorted(places, np.array([number, number + 1], np.uint64) << np.uint64(32))
    return set((places[first:end] & np.uint64(2**32 - 1)).tolist())


def bands(config: DataConfig) -> int:
    """Return how many keys a document has."""
    if config.dedup == "exact":
        return 1
    return int(_minhash().config.num_buckets)


@dataclass(frozen=True)
class Signatures:
    """The task that writes the keys of a piece's documents: uint64, shape (2, bands, documents), keys in order and then whose they are."""

    folder: Path
    config: DataConfig

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npy"

    def __call__(self, number: int, piece: Piece) -> None:
        keys = array("Q")
        for text in kept_documents(piece, self.config, Counter()):
            keys.extend(_minhash_keys(text) if self.config.dedup == "minhash" else [_hash(text.encode())])
        by_band = np.frombuffer(keys, np.uint64).reshape(-1, bands(self.config)).T
        order = np.argsort(by_band, kind="stable")
        _write(self.path(number), np.stack([np.take_along_axis(by_band, order, axis=1), order.astype(np.uint64)]))


@dataclass(frozen=True)
class Links:
    """The task that finds documents of the same key, in one of ``ranges`` parts of a band: uint64, shape (links, 2), the first and another.

    Args:
        signatures: the task that has written the keys of ``pieces`` pieces.
    """

    folder: Path
    signatures: Signatures
    pieces: int
    ranges: int

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npy"

    def __call__(self, number: int, _: Piece) -> None:
        band, part = divmod(number, self.ranges)
        lowest, highest = np.uint64(2**64 * part // self.ranges), np.uint64(2**64 * (part + 1) // self.ranges - 1)
        keys, places = [], []
        for piece in range(self.pieces):
            of_band, documents = np.load(self.signatures.path(piece), mmap_mode="r")[:, band]
            here = slice(np.searchsorted(of_band, lowest, "left"), np.searchsorted(of_band, highest, "right"))
            keys.append(of_band[here])
            places.append(documents[here] | np.uint64(piece) << np.uint64(32))
        _write(self.path(number), _links(np.concatenate(keys), np.concatenate(places)))


def _links(keys: Array, places: Array) -> Array:
    """Return the first place with a key beside each later one; ``places`` are in order where keys are equal."""
    order = np.argsort(keys, kind="stable")
    keys, places = keys[order], places[order]
    again = np.zeros(len(keys), np.bool_)
    again[1:] = keys[1:] == keys[:-1]
    first = np.maximum.accumulate(np.where(again, 0, np.arange(len(keys))))
    return np.stack([places[first[again]], places[again]], axis=1)


def _followers(links: list[Array]) -> Array:
    """Return, in order, the places that are linked, directly or through others, to one before them."""
    places, ends = np.unique(np.concatenate([np.zeros((0, 2), np.uint64), *links]), return_inverse=True)
    a, b = ends.reshape(-1, 2).T
    leader = np.arange(len(places))  # of each place: one it is linked to, in the end the first
    while True:
        lower = np.minimum(leader[a], leader[b])
        new = leader.copy()
        for ends in (a, b, leader[a], leader[b]):
            np.minimum.at(new, ends, lower)
        new = new[new]
        if np.array_equal(new, leader):
            return places[leader < np.arange(len(places))]
        leader = new


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _minhash_keys(text: str) -> list[int]:
    """Return a key for each band; a text of fewer than five words has no 5-gram, and matches only its equals."""
    step = _minhash()
    shingles = step.get_shingles(LONG_RUN.sub(" ", text))
    if not len(shingles):
        return [_hash(text.encode())] * step.config.num_buckets
    # The minimum over all 5-grams is the minimum over their parts.
    parts = [step.get_signature(shingles[start : start + SHINGLES_AT_ONCE]) for start in range(0, len(shingles), SHINGLES_AT_ONCE)]
    return [_hash(band.tobytes()) for band in np.array(parts, np.uint64).min(axis=0)]


@lru_cache(maxsize=1)
def _minhash() -> MinhashDedupSignature:
    require_datatrove("data.dedup", "minhash")
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig

    # Its default, xxhash, fails with xxhash 4, which takes no str.
    return MinhashDedupSignature("unused", MinhashConfig(hash_config=HashConfig(hash_fc="sha1")))


def _run(engine: Engine, task: Signatures | Links, work: Iterator[tuple[int, Piece]], show_progress: bool) -> int:
    """Do the task on all that it has not been done on, and return how many there are."""
    count = 0
    futures: deque[Future[None]] = deque()
    try:
        with tqdm(desc="looking for duplicates", unit="task", leave=False, disable=not show_progress) as bar:
            while True:
                if len(futures) <= engine.ahead // 2:
                    more = list(islice(work, engine.ahead - len(futures)))
                    count += len(more)
                    missing = [(number, piece) for number, piece in more if not task.path(number).exists()]
                    futures.extend(engine.submit(task, missing))
                    bar.update(len(more) - len(missing))
                    if not more and not futures:
                        return count
                if futures:
                    futures.popleft().result()
                    bar.update()
    finally:
        for future in futures:
            future.cancel()


def _digest(corpus: Corpus, config: DataConfig) -> str:
    """Return a hash over all that decides what is dropped."""
    settings = config.model_dump(mode="json", include={"text_column", "max_document_bytes", "filters", "dedup"})
    key = json.dumps([corpus.id, PIECE_BYTES, settings], sort_keys=True)
    return hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:8]


def _write(path: Path, content: Array) -> None:
    """Write the array whole or not at all; a task that was taken for lost may write the same at the same time."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PART}")
    try:
        with part.open("wb") as stream:
            np.save(stream, content)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
