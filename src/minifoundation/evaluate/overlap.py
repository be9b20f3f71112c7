"""N-grams of words that items of a benchmark share with a stream of tokens: fast over the stream, memory bounded by the items.

A word is a run of letters, digits and bytes beyond ASCII, lower case; all else separates. Words and n-grams are 64-bit polynomial hashes
(Karp-Rabin) from prefix sums, so that numpy computes them for many words at once. An n-gram lies within one document of the stream and
within one field of an item.

What can be known without hashing sorts out nearly all of the stream: n words in a row of an item have the same letters, in whatever order,
as n words of the text that equal them. The sum of their letters' random numbers needs no powers and no hash of a word: it is a difference
of one running sum over the tokens. Only words whose sum is among those of the items are hashed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Sums = npt.NDArray[np.uint32]
Bytes = npt.NDArray[np.uint8]
Places = npt.NDArray[np.int64]

CHUNK = 1 << 16
"""Tokens read at once: what is computed on the way stays in the processor's cache. Also the longest n-gram that is found, in tokens."""
TOGETHER = 1 << 12
"""N-grams of the stream that are looked up at once."""
BREAK = 0xFF
"""A byte that no UTF-8 text has: ends a document, or a field of an item."""
BITS_A_SUM = 16
"""At least so many has each of the two tables that sort out the stream: 1 sum in 16 passes one by chance at most, 1 in 256 both."""
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


_VALUES: Sums = (_mixed(_LETTERS * np.uint64(_BASE)) >> np.uint64(32)).astype(np.uint32)
"""Of each byte: the random number of its letter, 0 for what separates."""


def _sums(values: Sums, starts: Places, n: int) -> Sums:
    """Return the sum of the values from each of ``starts`` to the ``n``-th one after it, where the end counts as one too."""
    total = np.zeros(len(values) + 1, np.uint32)
    np.cumsum(values, out=total[1:])
    before: Sums = np.append(total.take(starts), total[-1])
    return before[n:] - before[:-n]


def _edges(values: npt.NDArray[Any]) -> tuple[Places, Places]:
    """Return where the runs of values other than 0 begin and end."""
    inside = np.zeros(len(values) + 2, bool)
    np.not_equal(values, 0, out=inside[1:-1])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    return edges[::2], edges[1::2]


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
        starts, ends = _edges(letters)
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
        hashes: of the n-grams, each once, in order, those of templates too.
        sums: of their letters, each once.
        items: how many there are.
    """

    def __init__(self, items: Sequence[Item], n: int) -> None:
        self.n = n
        self.items = len(items)
        every, owners, sums = [], [], []
        for number in range(0, len(items), 1024):  # a part at a time: its powers stay few
            block = items[number : number + 1024]
            owner = np.repeat(np.arange(number, number + len(block)), [len(item.fields) for item in block])
            fields = [text.encode("utf-8", "replace") + bytes([BREAK]) for item in block for text in item.fields]
            raw = np.frombuffer(b"".join(fields), np.uint8)
            words = Words.of(raw)
            hashes = words.ngrams(n)
            places = words.within(np.arange(len(hashes)), n)
            every.append(hashes[places])
            owners.append(owner[words.documents(places)])
            sums.append(_sums(_VALUES[raw], words.starts, n)[places])
        self.sums: Sums = np.unique(np.concatenate(sums)) if sums else np.empty(0, np.uint32)
        item_of = np.concatenate(owners) if owners else np.empty(0, np.int64)
        self.hashes, place = _numbered(np.concatenate(every) if every else np.empty(0, np.uint64))
        kept = ~_templates(place, item_of, [item.label for item in items])
        self._place, self._item_of = place[kept], item_of[kept]

    def found(self, hashes: Hashes) -> tuple[npt.NDArray[np.bool_], Places]:
        """Return which of ``hashes`` are among ``self.hashes``, and the numbers there of those that are."""
        if not len(self.hashes):
            return np.zeros(len(hashes), bool), np.empty(0, np.int64)
        order = np.argsort(hashes)  # neighbours share the way through the memory: three times as fast
        numbers = np.empty(len(hashes), np.int64)
        numbers[order] = np.searchsorted(self.hashes, hashes[order]).clip(max=len(self.hashes) - 1)
        there = self.hashes[numbers] == hashes
        return there, numbers[there]

    def coverage(self, seen: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        """Return of each item the share of its n-grams that were seen, templates left aside, NaN where it has none.

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


class _Sieve:
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


_OPENS, _BEGINS, _ENDS = 1, 2, 4
"""Of a run: a word begins with it whatever stands before; it begins with its token's first byte; it ends with its token's last one."""


@dataclass(frozen=True)
class Vocabulary:
    """What each token id is to words: runs of letters, and whether something separates each from what stands before it.

    The hash of a word is that of its letters one after another, so it comes from the runs without decoding a byte. Nearly every token is
    one run, or nothing but what separates, and then its id is the number of its run; further runs have numbers above the ids.

    Attributes:
        count: of the runs of each id, 0 for one without a byte.
        more: the number of the second run of each id, the others follow.
        hashes, lengths, sums, state: of each run, by its number.
        breaks: whether a document ends there.
        end: the number of a run that no token has, with which a document ends.
    """

    count: npt.NDArray[np.uint16]
    more: Places
    hashes: Hashes
    lengths: Places
    sums: Sums
    state: Bytes
    breaks: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, surfaces: Sequence[bytes], *, breaks: Sequence[int]) -> Vocabulary:
        """Return the vocabulary of ``surfaces``, the bytes of each id; the ids ``breaks`` end a document."""
        texts = [b" " if token in breaks else surface for token, surface in enumerate(surfaces)]
        raw = np.frombuffer(b"".join(b" " + text for text in texts), np.uint8)  # the space parts the runs of two tokens
        size = np.array([len(text) for text in texts], np.int64)
        first = np.cumsum(size + 1) - size
        letters = _LETTERS[raw]
        starts, ends = _edges(letters)
        token = np.searchsorted(first, starts, side="right") - 1
        runs = np.bincount(token, minlength=len(texts))
        rank = np.arange(len(token)) - (np.cumsum(runs) - runs)[token]
        number = np.where(rank == 0, token, len(texts) + np.cumsum(rank > 0) - 1)
        total = len(texts) + int(np.sum(rank > 0)) + 1
        more = np.zeros(len(texts), np.int64)
        more[token[rank == 1]] = number[rank == 1]
        hashes, lengths, sums, state = (
            np.zeros(total, np.uint64),
            np.zeros(total, np.int64),
            np.zeros(total, np.uint32),
            np.zeros(total, np.uint8),
        )
        powers = _WORD.at_least(len(raw) + 1)
        hashed, summed = powers.sums(letters), np.concatenate([[0], np.cumsum(_VALUES[raw], dtype=np.uint32)])
        hashes[number] = (hashed[ends] - hashed[starts]) * powers.down[starts]
        sums[number] = summed[ends] - summed[starts]
        lengths[number] = ends - starts
        state[number] = np.where(starts == first[token], _BEGINS, _OPENS) + np.where(ends == (first + size)[token], _ENDS, 0)
        stops = np.zeros(total, bool)
        stops[[*breaks, -1]] = True
        return cls(np.maximum(runs, size > 0).astype(np.uint16), more, hashes, lengths, sums, state, stops)

    @property
    def end(self) -> int:
        return len(self.breaks) - 1

    def runs(self, tokens: npt.NDArray[Any]) -> Places:
        """Return the numbers of the runs of ``tokens``."""
        ids = tokens.astype(np.int64)  # at once: every index of another type would be converted each time
        count = self.count.take(ids)
        odd = np.flatnonzero(count != 1)
        if not len(odd):
            return ids
        runs = np.repeat(ids, count)
        counts = count[odd].astype(np.int64)
        place = odd + np.cumsum(counts - 1) - (counts - 1)
        for rank in range(1, int(counts.max(initial=1))):
            longer = counts > rank
            runs[place[longer] + rank] = self.more[ids[odd[longer]]] + rank - 1
        return runs

    def starts(self, runs: Places) -> Places:
        """Return the places of those of ``runs`` with which a word begins."""
        state = self.state.take(runs)
        opens = state & _OPENS
        begins = state & _BEGINS
        begins[1:] &= ~(state[:-1] >> 1)  # the bit of _ENDS on that of _BEGINS: the word before goes on
        opens |= begins >> 1
        starts: Places = np.flatnonzero(opens.view(bool))
        return starts

    def words(self, runs: Places, starts: Places) -> Words:
        """Return the words that begin at ``starts`` among ``runs``; what stands before the first is no part of them."""
        places = np.zeros(len(runs) + 1, np.int64)  # of each run's first letter among all letters
        np.cumsum(self.lengths.take(runs), out=places[1:])
        powers = _WORD.at_least(int(places[-1]) + 1)
        total = np.zeros(len(runs) + 1, np.uint64)
        np.cumsum(self.hashes.take(runs) * powers.up.take(places[:-1]), out=total[1:])
        sums = total.take(np.append(starts, len(runs)))
        hashes = _mixed((sums[1:] - sums[:-1]) * powers.down.take(places.take(starts)))
        return Words(hashes, starts, np.flatnonzero(self.breaks.take(runs)))


class Scan:
    """A stream of tokens compared with several indexes at once.

    A long n-gram of an item begins with a short one of it, so only what the sieve of the shortest n lets pass is hashed, and a long one is
    looked up where the shorter one was found.
    """

    def __init__(self, vocabulary: Vocabulary, indexes: Sequence[Index]) -> None:
        self.vocabulary = vocabulary
        self.indexes = sorted(indexes, key=lambda index: index.n)
        self.seen = {index.n: np.zeros(len(index.hashes), bool) for index in self.indexes}
        self._sieve = _Sieve(self.indexes[0].sums)
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
        sums = _sums(self.vocabulary.sums.take(runs), starts, self.indexes[0].n)
        found = self._sieve.passed(sums[: max(0, count)])
        if not len(found):
            return
        longest = self.indexes[-1].n
        depth = np.zeros(len(starts), np.int64)  # of how many of the longest n-grams each word is a part
        depth[found] = 1
        np.cumsum(depth, out=depth)
        depth[longest:] -= depth[:-longest].copy()
        first, last = _edges(depth)
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
