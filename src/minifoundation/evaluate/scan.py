"""Which n-grams of items a stream of tokens has: fast over the stream, memory bounded by the items.

What can be known without hashing sorts out nearly all of the stream: n words in a row of an item have the same letters, in whatever order,
as n words of the text that equal them. The sum of their letters' random numbers needs no powers and no hash of a word: it is a difference
of one running sum over the tokens. Only words whose sum is among those of the items are hashed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from minifoundation.evaluate.ngrams import Index, Places, Sums, edges, sums_of
from minifoundation.evaluate.vocabulary import Vocabulary

CHUNK = 1 << 16
"""Tokens read at once: what is computed on the way stays in the processor's cache. Also the longest n-gram that is found, in tokens."""
TOGETHER = 1 << 12
"""N-grams of the stream that are looked up at once."""
BITS_A_SUM = 16
"""At least so many has each of the two tables that sort out the stream: 1 sum in 16 passes one by chance at most, 1 in 256 both."""


class Sieve:
    """Tells which sums may be among given ones: all that are pass, and few of the others."""

    def __init__(self, sums: Sums) -> None:
        bits = min(32, max(16, (BITS_A_SUM * len(sums)).bit_length()))
        self._shift = np.uint32(32 - bits)
        self._tables = []
        for factor in (np.uint32(0x9E3779B1), np.uint32(0x85EBCA77)):
            slots = (sums * factor) >> self._shift
            table = np.zeros(1 << bits >> 3, np.uint8)
            np.bitwise_or.at(table, slots >> np.uint32(3), np.uint8(1) << (slots & np.uint32(7)).astype(np.uint8))
            self._tables.append((factor, table))

    def passed(self, sums: Sums) -> Places:
        """Return the places of those of ``sums`` that pass."""
        places = None
        for factor, table in self._tables:
            slots = (sums if places is None else sums.take(places)) * factor
            slots >>= self._shift
            bits = table.take((slots >> np.uint32(3)).astype(np.intp))
            bits >>= (slots & np.uint32(7)).astype(np.uint8)
            bits &= 1
            among = np.flatnonzero(bits.view(bool))
            places = among if places is None else places.take(among)
        assert places is not None
        return places


class Scan:
    """A stream of tokens compared with several indexes at once.

    A long n-gram of an item begins with a short one of it, so only what the sieve of the shortest n lets pass is hashed, and a long one is
    looked up where the shorter one was found.
    """

    def __init__(self, vocabulary: Vocabulary, indexes: Sequence[Index]) -> None:
        self.vocabulary = vocabulary
        self.indexes = sorted(indexes, key=lambda index: index.n)
        self.seen = {index.n: np.zeros(len(index.hashes), bool) for index in self.indexes}
        self._sieve = Sieve(self.indexes[0].sums)
        self._runs: list[Places] = []
        self._places: list[Places] = []
        self._words = 0

    def read(self, tokens: npt.NDArray[Any]) -> None:
        """Note which n-grams the text of ``tokens``, a whole shard, has."""
        longest = self.indexes[-1].n
        left = np.empty(0, np.int64)
        for place in range(0, len(tokens), CHUNK):
            runs = np.concatenate([left, self.vocabulary.runs(tokens[place : place + CHUNK])])
            starts = self.vocabulary.starts(runs)
            self._sift(runs, starts, len(starts) - longest)  # the last words may go on in the next chunk
            cut = starts[max(0, len(starts) - longest)] if len(starts) else len(runs)
            if len(runs) - cut > CHUNK:  # words longer than those of any item: what is left begins with the next one
                later = starts[starts >= len(runs) - CHUNK]
                cut = later[0] if len(later) else len(runs) - CHUNK
            left = runs[cut:]
        starts = self.vocabulary.starts(left)
        self._sift(left, starts, len(starts))
        self._look_up()

    def _sift(self, runs: Places, starts: Places, count: int) -> None:
        """Set aside the words of n-grams that pass the sieve and begin with one of the first ``count`` words."""
        sums = sums_of(self.vocabulary.sums.take(runs), starts, self.indexes[0].n)
        found = self._sieve.passed(sums[: max(0, count)])
        if not len(found):
            return
        longest = self.indexes[-1].n
        depth = np.zeros(len(starts), np.int64)  # of how many of the longest n-grams each word is a part
        depth[found] = 1
        np.cumsum(depth, out=depth)
        depth[longest:] -= depth[:-longest].copy()
        first, last = edges(depth)
        bounds = np.append(starts, len(runs))
        begins, size = bounds[first], bounds[last] - bounds[first] + 1  # one more: what parts it from the words of elsewhere
        moved = np.cumsum(size) - size
        part = runs.take(np.repeat(begins - moved, size) + np.arange(size.sum()), mode="clip")
        part[moved + size - 1] = self.vocabulary.end
        self._runs.append(part)
        covered = np.cumsum(depth > 0)
        self._places.append(self._words + covered[found] - 1)
        self._words += int(covered[-1])
        if sum(map(len, self._places)) >= TOGETHER:
            self._look_up()

    def _look_up(self) -> None:
        """Note which of the n-grams set aside are those of the indexes."""
        if not self._runs:
            return
        runs, places = np.concatenate(self._runs), np.concatenate(self._places)
        self._runs.clear()
        self._places.clear()
        self._words = 0
        words = self.vocabulary.words(runs, self.vocabulary.starts(runs))
        for index in self.indexes:
            places = words.within(places, index.n)
            there, numbers = index.found(words.ngrams(index.n)[places])
            self.seen[index.n][numbers] = True
            places = places[there]
