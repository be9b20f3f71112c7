"""N-grams of words that items of a benchmark share with a stream of tokens: fast over the stream, memory bounded by the items.

A word is a run of letters, digits and bytes beyond ASCII, lower case; all else separates. Words and n-grams are 64-bit polynomial hashes
(Karp-Rabin) from prefix sums, so that numpy computes them for a whole chunk at once. An n-gram lies within one document of the stream and
within one field of an item.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]

CHUNK = 1 << 15
"""Tokens hashed at once; what is computed on the way stays in the processor's cache."""
OVERLAP = 512
"""Tokens that a chunk repeats of the one before, more than any n-gram has."""
BREAK = 0xFF
"""A byte that no UTF-8 text has: ends a document, or a field of an item."""
BITS_AN_NGRAM = 64
"""Of the table that sorts out nearly all n-grams of the stream before they are looked up: 1 in 64 passes by chance."""
TEMPLATE = 0.005
"""An n-gram that more than this share of a benchmark's items have is its template (and more than 5 of them)."""

_LETTERS = np.zeros(256, np.uint8)
for _span, _to in (((ord("0"), ord("9")), ord("0")), ((ord("a"), ord("z")), ord("a")), ((ord("A"), ord("Z")), ord("a")), ((128, 254), 128)):
    _LETTERS[_span[0] : _span[1] + 1] = np.arange(_to, _to + _span[1] - _span[0] + 1)

_BASE, _NGRAM_BASE = 0x9E3779B97F4A7C15 | 1, 0xD6E8FEB86659FD93 | 1  # odd, so that they have inverses modulo 2^64


@dataclass(frozen=True)
class _Powers:
    """Powers of an odd number modulo 2^64 and of its inverse."""

    up: Hashes
    down: Hashes

    @classmethod
    def of(cls, base: int, count: int) -> _Powers:
        inverse = pow(base, -1, 1 << 64)
        up, down = np.full(count, base, np.uint64), np.full(count, inverse, np.uint64)
        up[0] = down[0] = 1
        return cls(np.cumprod(up), np.cumprod(down))

    def at_least(self, count: int) -> _Powers:
        """Return as many powers as ``count``: these, where they suffice."""
        return self if count <= len(self.up) else _Powers.of(int(self.up[1]), count)

    def sums(self, values: Hashes | Bytes) -> Hashes:
        """Return the sums of all values before each place, the last one included, each value times its power."""
        total = np.empty(len(values) + 1, np.uint64)
        total[0] = 0
        np.cumsum(values * self.up[: len(values)], out=total[1:])
        return total


_WORD, _NGRAM = _Powers.of(_BASE, 8 * CHUNK), _Powers.of(_NGRAM_BASE, 4 * CHUNK)


def _mixed(hashes: Hashes) -> Hashes:
    """Return hashes whose every bit depends on every bit (the finaliser of MurmurHash3)."""
    hashes ^= hashes >> np.uint64(33)
    hashes *= np.uint64(0xFF51AFD7ED558CCD)
    hashes ^= hashes >> np.uint64(33)
    return hashes


@dataclass(frozen=True)
class Words:
    """The words of a text: the hash of each, where each begins and where the text's documents end, counted in bytes or runs of letters."""

    hashes: Hashes
    starts: Places
    breaks: Places

    @classmethod
    def of(cls, raw: Bytes) -> Words:
        """Return the words of ``raw``, whose documents end with ``BREAK``."""
        letters = _LETTERS[raw]
        inside = np.zeros(len(raw) + 2, bool)
        np.not_equal(letters, 0, out=inside[1:-1])
        edges = np.flatnonzero(inside[1:] != inside[:-1])
        starts, ends = edges[::2], edges[1::2]
        powers = _WORD.at_least(len(letters))
        total = powers.sums(letters)
        return cls(_mixed((total[ends] - total[starts]) * powers.down[starts]), starts, np.flatnonzero(raw == BREAK))

    def documents(self, places: Places) -> Places:
        """Return the number of the document in which each of the words at ``places`` stands."""
        number: Places = np.searchsorted(self.breaks, self.starts[places], side="right")
        return number

    def ngrams(self, n: int) -> Hashes:
        """Return the hash of the ``n`` words from each place on, those across the end of a document too."""
        if len(self.hashes) < n:
            return self.hashes[:0]
        powers = _NGRAM.at_least(len(self.hashes))
        total = powers.sums(self.hashes)
        return _mixed((total[n:] - total[:-n]) * powers.down[: len(self.hashes) - n + 1])

    def within(self, places: Places, n: int) -> Places:
        """Return those of ``places`` from which ``n`` words lie within one document."""
        inner = places[places + n <= len(self.hashes)]
        whole: Places = inner[self.documents(inner) == self.documents(inner + n - 1)]
        return whole


@dataclass(frozen=True)
class Item:
    """A test item: the task and the hash that tell it, and the texts of its fields."""

    label: str
    task: str
    doc_hash: str
    fields: tuple[str, ...]


class Index:
    """The n-grams of items.

    Attributes:
        hashes: of the n-grams, each once, in order.
        items: how many there are.
    """

    def __init__(self, items: Sequence[Item], n: int) -> None:
        self.n = n
        self.items = len(items)
        every, owners = [], []
        for number in range(0, len(items), 1024):  # a part at a time: its powers stay few
            block = items[number : number + 1024]
            owner = np.repeat(np.arange(number, number + len(block)), [len(item.fields) for item in block])
            fields = [text.encode("utf-8", "replace") + bytes([BREAK]) for item in block for text in item.fields]
            words = Words.of(np.frombuffer(b"".join(fields), np.uint8))
            hashes = words.ngrams(n)
            places = words.within(np.arange(len(hashes)), n)
            every.append(hashes[places])
            owners.append(owner[words.documents(places)])
        self.every: Hashes = np.concatenate(every) if every else np.empty(0, np.uint64)
        """With the templates: what passes the filter of a scan."""
        item_of = np.concatenate(owners) if owners else np.empty(0, np.int64)
        unique, place = _numbered(self.every)
        kept = ~_templates(place, item_of, [item.label for item in items])
        used = np.zeros(len(unique), bool)
        used[place[kept]] = True
        self.hashes = unique[used]
        self._place, self._item_of = (np.cumsum(used) - 1)[place[kept]], item_of[kept]

    def numbers(self, hashes: Hashes) -> npt.NDArray[np.int64]:
        """Return which of ``self.hashes``, by number, are among ``hashes``."""
        if not len(self.hashes) or not len(hashes):
            return np.empty(0, np.int64)
        places = np.searchsorted(self.hashes, hashes).clip(max=len(self.hashes) - 1)
        found: Places = places[self.hashes[places] == hashes]
        return found

    def coverage(self, seen: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        """Return of each item the share of its n-grams that were seen, NaN where it has none.

        Args:
            seen: of each of ``self.hashes``.
        """
        total = np.bincount(self._item_of, minlength=self.items)
        hit = np.bincount(self._item_of, weights=seen[self._place], minlength=self.items)
        with np.errstate(invalid="ignore"):
            share: npt.NDArray[np.float64] = hit / total
        return share


def _numbered(hashes: Hashes) -> tuple[Hashes, Places]:
    """Return the different ones of ``hashes`` in order, and the number of each (np.unique takes five times as long)."""
    order = np.argsort(hashes, kind="stable")
    first = np.ones(len(hashes), bool)
    first[1:] = hashes[order[1:]] != hashes[order[:-1]]
    place = np.empty(len(hashes), np.int64)
    place[order] = np.cumsum(first) - 1
    return hashes[order[first]], place


def _templates(place: Places, item_of: Places, labels: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Return which n-grams (by number ``place``) many items of a benchmark have: its instructions, not its content."""
    if not len(place):
        return np.zeros(0, bool)
    number = {label: at for at, label in enumerate(dict.fromkeys(labels))}
    label_of = np.array([number[label] for label in labels], np.int64)
    limits = np.array([max(5.0, TEMPLATE * count) for count in Counter(label_of.tolist()).values()])
    pairs = np.sort(place * len(labels) + item_of)
    once = pairs[np.concatenate([[True], pairs[1:] != pairs[:-1]])]  # each n-gram of an item once
    key = np.sort(once // len(labels) * len(number) + label_of[once % len(labels)])
    starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    count = np.diff(np.append(starts, len(key)))
    key = key[starts]
    common = np.zeros(int(place.max()) + 1, bool)
    common[key[count > limits[key % len(number)]] // len(number)] = True
    return common[place]


class Scan:
    """A stream compared with several indexes at once.

    A long n-gram of an item begins with a short one of it: whatever the filter of the shortest n lets pass is looked up, nothing else.
    """

    def __init__(self, indexes: Sequence[Index]) -> None:
        self.indexes = sorted(indexes, key=lambda index: index.n)
        self.seen = {index.n: np.zeros(len(index.hashes), bool) for index in self.indexes}
        bits = max(16, (BITS_AN_NGRAM * len(self.indexes[0].hashes)).bit_length())
        self._shift = np.uint64(64 - bits)
        slots = np.sort(self.indexes[0].every >> self._shift)
        self._table = np.zeros(1 << bits >> 3, np.uint8)
        np.bitwise_or.at(self._table, slots >> np.uint64(3), np.uint8(1) << (slots & np.uint64(7)).astype(np.uint8))

    def read(self, words: Words) -> None:
        """Note which n-grams a text has."""
        shortest = words.ngrams(self.indexes[0].n)
        slots = shortest >> self._shift
        passed = (self._table.take((slots >> np.uint64(3)).view(np.int64)) >> (slots & np.uint64(7)).astype(np.uint8)) & np.uint8(1)
        places = np.flatnonzero(passed)
        for index in self.indexes:
            hashes = shortest if index.n == self.indexes[0].n else words.ngrams(index.n)
            self.seen[index.n][index.numbers(hashes[words.within(places, index.n)])] = True


@dataclass(frozen=True)
class Vocabulary:
    """What each token id is to words: runs of letters, and whether something separates each from what stands before it.

    The hash of a word is that of its letters one after another, so it comes from the runs without decoding a byte.

    Attributes:
        hashes, lengths, opens: of the runs of all ids, one after another; a run without letters stands for what separates.
        first, count: where the runs of an id are.
        breaks: the run that ends a document.
    """

    hashes: Hashes
    lengths: Places
    opens: npt.NDArray[np.bool_]
    first: Places
    count: Places
    breaks: int

    @classmethod
    def of(cls, surfaces: Sequence[bytes], *, breaks: Sequence[int]) -> Vocabulary:
        """Return the vocabulary of ``surfaces``, the bytes of each id; the ids ``breaks`` end a document."""
        hashes, lengths, opens = [np.uint64(0)], [0], [True]
        first, count = np.zeros(len(surfaces), np.int64), np.zeros(len(surfaces), np.int64)
        for token, surface in enumerate(surfaces):
            if token in breaks:
                count[token] = 1
                continue
            letters = _LETTERS[np.frombuffer(surface, np.uint8)]
            first[token] = len(hashes)
            edges = np.flatnonzero(np.diff(np.concatenate([[0], letters != 0, [0]]).astype(np.int8)))
            for start, end in edges.reshape(-1, 2):
                hashes.append(_WORD.sums(letters[start:end])[-1])
                lengths.append(int(end - start))
                opens.append(bool(start > 0))
            if len(letters) and not letters[-1]:
                hashes.append(np.uint64(0))
                lengths.append(0)
                opens.append(True)
            count[token] = len(hashes) - first[token]
        return cls(np.array(hashes), np.array(lengths, np.int64), np.array(opens), first, count, 0)

    def words(self, tokens: npt.NDArray[Any]) -> Words:
        """Return the words of ``tokens``."""
        ids = tokens.astype(np.intp)  # at once: every index of another type would be converted each time
        count = self.count.take(ids)
        runs = np.repeat(self.first.take(ids) - (np.cumsum(count) - count), count)
        runs += np.arange(len(runs))
        places = np.zeros(len(runs) + 1, np.intp)  # of each run's first letter among all letters
        np.cumsum(self.lengths.take(runs), out=places[1:])
        powers = _WORD.at_least(int(places[-1]) + 1)
        total = np.zeros(len(runs) + 1, np.uint64)
        np.cumsum(self.hashes.take(runs) * powers.up.take(places[:-1]), out=total[1:])
        starts = np.flatnonzero(self.opens.take(runs))
        if not len(starts) or starts[0]:
            starts = np.concatenate([[0], starts])
        edges = np.append(starts, len(runs))
        place, sums = places.take(edges), total.take(edges)
        words = np.flatnonzero(place[1:] != place[:-1])  # the others are only what separates
        hashes = _mixed((sums.take(words + 1) - sums.take(words)) * powers.down.take(place.take(words)))
        return Words(hashes, starts.take(words), np.flatnonzero(runs == self.breaks))


def chunks(tokens: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """Yield the tokens of a shard in pieces that overlap, so that an n-gram across a cut is in one of them."""
    for start in range(0, max(1, len(tokens)), CHUNK):
        yield tokens[max(0, start - OVERLAP) : start + CHUNK]


def seen_in(tokens: npt.NDArray[Any], vocabulary: Vocabulary, indexes: Sequence[Index]) -> dict[int, npt.NDArray[np.bool_]]:
    """Return by n which n-grams of the indexes the text of ``tokens`` has."""
    scan = Scan(indexes)
    for chunk in chunks(tokens):
        scan.read(vocabulary.words(np.asarray(chunk)))
    return scan.seen
