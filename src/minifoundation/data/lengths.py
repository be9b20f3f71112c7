"""Rows for long contexts: documents that are long enough, each from its beginning, and short ones packed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from minifoundation.data.samples import Order, permutation, samples_in
from minifoundation.data.shards import Shard
from minifoundation.data.survey import starts_of

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Documents:
    """The documents of some shards: in which shard each lies, where in it, and how many tokens it has, all (documents,)."""

    shards: Sequence[Shard]
    shard: Ints
    start: Ints
    length: Ints

    @classmethod
    def of(cls, shards: Sequence[Shard], eos: int) -> Documents:
        """Return the documents of ``shards``, each ended by ``eos``; reads every token once."""
        starts = [starts_of(shard, eos) for shard in shards]
        lengths = [np.diff(one, append=shard.n_tokens) for one, shard in zip(starts, shards, strict=True)]
        none = np.zeros(0, np.int64)
        which = np.repeat(np.arange(len(shards)), [len(one) for one in starts])
        return cls(shards, which, np.concatenate([none, *starts]), np.concatenate([none, *lengths]))

    def __len__(self) -> int:
        return len(self.length)

    def where(self, chosen: npt.NDArray[np.bool_]) -> Documents:
        """Return the documents that are ``chosen``."""
        return Documents(self.shards, self.shard[chosen], self.start[chosen], self.length[chosen])

    def tokens(self, number: int, first: int = 0, count: int | None = None) -> npt.NDArray[Any]:
        """Return the ids of a document from its token ``first`` on, ``count`` of them at most."""
        begin, end = self.start[number] + first, self.start[number] + self.length[number]
        ids: npt.NDArray[Any] = self.shards[self.shard[number]].tokens()[begin : end if count is None else min(end, begin + count)]
        return ids


class Rows(ABC):
    """Rows made of whole documents, in an order of their own in each epoch.

    Args:
        documents: that rows are made of.
        stream: tells the orders of different rows of one seed apart.
    """

    def __init__(self, documents: Documents, order: Order, *, seed: int, stream: int) -> None:
        self.order, self.first_shard, self.seq_len, self.seed = order, order.first_shard, order.seq_len, seed
        self.documents = documents
        self._permutation = lru_cache(maxsize=2)(lambda epoch: permutation(self.samples_per_epoch, seed, epoch, stream))

    @property
    @abstractmethod
    def samples_per_epoch(self) -> int:
        """How many rows there are."""

    @abstractmethod
    def _fill(self, row: Ints, which: int, epoch: int) -> None:
        """Write the tokens of row number ``which``, before it is shuffled, to ``row``."""

    def has(self, samples: int) -> bool:
        """Return that every sample can be read: all shards are there from the beginning."""
        return True

    def touched(self, _samples: int) -> int:
        """Return the shards that the documents are from."""
        return len(self.documents.shards)

    def epochs(self, samples: int) -> float:
        """Return how often all have been read after ``samples``."""
        return samples / self.samples_per_epoch

    def rows(self, numbers: Sequence[int] | Ints) -> Ints:
        """Return the tokens of the samples ``numbers``, (len(numbers), seq_len + 1)."""
        found = np.empty((len(numbers), self.seq_len + 1), np.int64)
        for row, number in zip(found, np.asarray(numbers, np.int64).tolist(), strict=True):
            epoch, within = divmod(number, self.samples_per_epoch)
            self._fill(row, int(self._permutation(epoch)[within]), epoch)
        return found


class LongRows(Rows):
    """Rows of ``seq_len`` + 1 tokens that begin with ``min_tokens`` of one document or more, and each begins where that does.

    A document longer than a row goes on in the next, from the last token of the one before; what then is left of it is a row's beginning if
    it is long enough by itself. Rows are filled up with short documents from their beginnings, the last one cut (any, where none is short).
    """

    def __init__(self, documents: Documents, order: Order, *, min_tokens: int, seed: int) -> None:
        super().__init__(documents, order, seed=seed, stream=0)
        self._short = np.flatnonzero(documents.length < min_tokens)
        if not len(self._short):
            self._short = np.arange(len(documents))
        T = self.seq_len
        whole = np.maximum(documents.length - 1, 0) // T
        left = documents.length - whole * T
        counts = np.where(documents.length < min_tokens, 0, whole + (left >= min_tokens))
        self.document = np.repeat(np.arange(len(documents)), counts)
        """Of each row, (rows,)."""
        self.first = T * (np.arange(len(self.document)) - np.repeat(np.cumsum(counts) - counts, counts))
        """Where in its document a row begins."""
        self.count = np.minimum(documents.length[self.document] - self.first, T + 1)
        """Tokens of that document."""

    @property
    def samples_per_epoch(self) -> int:
        return len(self.document)

    def _fill(self, row: Ints, which: int, epoch: int) -> None:
        at = int(self.count[which])
        row[:at] = self.documents.tokens(int(self.document[which]), int(self.first[which]), at)
        next_short = int(np.random.SeedSequence((self.seed, epoch, which)).generate_state(1, np.uint64)[0])
        while at < len(row):
            part = self.documents.tokens(int(self._short[next_short % len(self._short)]), count=len(row) - at)
            row[at : at + len(part)] = part
            at, next_short = at + len(part), next_short + 1


class PackedRows(Rows):
    """Rows of ``seq_len`` + 1 tokens of the documents shorter than ``min_tokens``, one after the other, cut where a row ends."""

    def __init__(self, documents: Documents, order: Order, *, min_tokens: int, seed: int) -> None:
        super().__init__(documents.where(documents.length < min_tokens), order, seed=seed, stream=1)

    @cached_property
    def _ends(self) -> Ints:
        return np.cumsum(self.documents.length)

    @property
    def samples_per_epoch(self) -> int:
        return samples_in(int(self._ends[-1]) if len(self._ends) else 0, self.seq_len)

    def _fill(self, row: Ints, which: int, _epoch: int) -> None:
        place = which * self.seq_len
        document = int(np.searchsorted(self._ends, place, side="right"))
        first, at = place - int(self._ends[document] - self.documents.length[document]), 0
        while at < len(row):
            part = self.documents.tokens(document, first, len(row) - at)
            row[at : at + len(part)] = part
            document, first, at = document + 1, 0, at + len(part)


@dataclass(frozen=True)
class Bucket:
    """Documents of some range of lengths, in the corpus and in what a phase reads."""

    shortest: int
    longest: int | None
    documents: int
    corpus: float
    """Share of the tokens of the shards that were searched."""
    mix: float
    """Share of the tokens that the phase reads."""


def buckets(long: LongRows, share: float) -> list[Bucket]:
    """Return the lengths of documents, in powers of two up to that of a row, where ``share`` of the rows begin with long ones.

    Fill is counted as spread over the short documents by their lengths.
    """
    documents, T = long.documents, long.seq_len
    edges = [0, *(2**power for power in range(max(T.bit_length() - 4, 3), T.bit_length())), T + 1]
    read = np.zeros(len(documents))
    if share:
        np.add.at(read, long.document, long.count * share / (len(long.document) * (T + 1)))
    short = documents.length < (documents.length[long.document].min() if len(long.document) else np.inf)
    if short.any():
        read[short] += (1 - read.sum()) * documents.length[short] / documents.length[short].sum()
    found = []
    for shortest, after in zip(edges, [*edges[1:], None], strict=True):
        here = (documents.length >= shortest) & (documents.length < (after or np.inf))
        corpus = documents.length[here].sum() / documents.length.sum()
        found.append(Bucket(shortest, None if after is None else after - 1, int(here.sum()), float(corpus), float(read[here].sum())))
    return found
