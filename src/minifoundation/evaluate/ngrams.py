"""N-grams of words, and those that the items of a benchmark have.

A word is a run of letters, digits and bytes beyond ASCII, lower case; all else separates, and so do ``MARKS``. Words and n-grams are
64-bit polynomial hashes (Karp-Rabin) from prefix sums, so that numpy computes them for many words at once. An n-gram lies within one
document of a text and within one field of an item.
"""

from __future__ import annotations

import re
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

BREAK = 0xFF
"""A byte that no UTF-8 text has: ends a document, or a field of an item."""
TEMPLATE = 0.005
"""An n-gram that more than this share of a benchmark's items have is its template (and more than 5 of them)."""

LETTERS = np.zeros(256, np.uint8)
for _span, _to in (((ord("0"), ord("9")), ord("0")), ((ord("a"), ord("z")), ord("a")), ((ord("A"), ord("Z")), ord("a")), ((128, 254), 128)):
    LETTERS[_span[0] : _span[1] + 1] = np.arange(_to, _to + _span[1] - _span[0] + 1)
"""Of each byte: its letter, in lower case; 0 for what separates."""

MARKS = tuple(chr(code).encode() for code in (0xA0, 0xAB, 0xBB, *range(0x2000, 0x2040)))
"""Spaces, quotes and dashes beyond ASCII. Those that a vocabulary spells in bytes are letters in its text, and have to be in items then."""

_BASE, _NGRAM_BASE = 0x9E3779B97F4A7C15 | 1, 0xD6E8FEB86659FD93 | 1  # odd, so that they have inverses modulo 2^64


@dataclass(frozen=True)
class Powers:
    """Powers of an odd number modulo 2^64 and of its inverse."""

    up: Hashes
    down: Hashes

    @classmethod
    def of(cls, base: int, count: int) -> Powers:
        inverse = pow(base, -1, 1 << 64)
        up, down = np.full(count, base, np.uint64), np.full(count, inverse, np.uint64)
        up[0] = down[0] = 1
        return cls(np.cumprod(up), np.cumprod(down))

    def at_least(self, count: int) -> Powers:
        """Return as many powers as ``count``: these, where they suffice."""
        return self if count <= len(self.up) else Powers.of(int(self.up[1]), count)

    def sums(self, values: Hashes | Bytes) -> Hashes:
        """Return the sums of all values before each place, the last one included, each value times its power."""
        total = np.empty(len(values) + 1, np.uint64)
        total[0] = 0
        np.cumsum(values * self.up[: len(values)], out=total[1:])
        return total


WORD_POWERS, _NGRAM_POWERS = Powers.of(_BASE, 1 << 19), Powers.of(_NGRAM_BASE, 1 << 18)  # about as many as a scan needs at once


def mixed(hashes: Hashes) -> Hashes:
    """Return hashes whose every bit depends on every bit (the finaliser of MurmurHash3)."""
    hashes ^= hashes >> np.uint64(33)
    hashes *= np.uint64(0xFF51AFD7ED558CCD)
    hashes ^= hashes >> np.uint64(33)
    return hashes


LETTER_VALUES: Sums = (mixed(LETTERS * np.uint64(_BASE)) >> np.uint64(32)).astype(np.uint32)
"""Of each byte: the random number of its letter, 0 for what separates."""


def sums_of(values: Sums, starts: Places, n: int) -> Sums:
    """Return the sum of the values from each of ``starts`` to the ``n``-th one after it, where the end counts as one too."""
    total = np.zeros(len(values) + 1, np.uint32)
    np.cumsum(values, out=total[1:])
    before: Sums = np.append(total.take(starts), total[-1])
    return before[n:] - before[:-n]


def spaced(text: bytes, marks: Sequence[bytes]) -> bytes:
    """Return ``text`` with a space in the place of each of ``marks``."""
    return re.sub(b"|".join(marks), b" ", text) if marks else text


def edges(values: npt.NDArray[Any]) -> tuple[Places, Places]:
    """Return where the runs of values other than 0 begin and end."""
    inside = np.zeros(len(values) + 2, bool)
    np.not_equal(values, 0, out=inside[1:-1])
    found = np.flatnonzero(inside[1:] != inside[:-1])
    return found[::2], found[1::2]


@dataclass(frozen=True)
class Words:
    """The words of a text: the hash of each, where each begins and where the text's documents end, counted in bytes or runs of letters."""

    hashes: Hashes
    starts: Places
    breaks: Places

    @classmethod
    def of(cls, raw: Bytes) -> Words:
        """Return the words of ``raw``, whose documents end with ``BREAK``."""
        letters = LETTERS[raw]
        starts, ends = edges(letters)
        powers = WORD_POWERS.at_least(len(letters))
        total = powers.sums(letters)
        return cls(mixed((total[ends] - total[starts]) * powers.down[starts]), starts, np.flatnonzero(raw == BREAK))

    def documents(self, places: Places) -> Places:
        """Return the number of the document in which each of the words at ``places`` stands."""
        number: Places = np.searchsorted(self.breaks, self.starts[places], side="right")
        return number

    def ngrams(self, n: int) -> Hashes:
        """Return the hash of the ``n`` words from each place on, those across the end of a document too."""
        if len(self.hashes) < n:
            return self.hashes[:0]
        powers = _NGRAM_POWERS.at_least(len(self.hashes))
        total = powers.sums(self.hashes)
        return mixed((total[n:] - total[:-n]) * powers.down[: len(self.hashes) - n + 1])

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

    Args:
        marks: those of ``MARKS`` that separate words in the text to compare with.

    Attributes:
        hashes: of the n-grams, each once, in order, those of templates too.
        sums: of their letters, each once.
        items: how many there are.
    """

    def __init__(self, items: Sequence[Item], n: int, marks: Sequence[bytes] = ()) -> None:
        self.n = n
        self.items = len(items)
        every, owners, sums = [], [], []
        for number in range(0, len(items), 1024):  # a part at a time: its powers stay few
            block = items[number : number + 1024]
            owner = np.repeat(np.arange(number, number + len(block)), [len(item.fields) for item in block])
            fields = [spaced(text.encode("utf-8", "replace"), marks) + bytes([BREAK]) for item in block for text in item.fields]
            raw = np.frombuffer(b"".join(fields), np.uint8)
            words = Words.of(raw)
            hashes = words.ngrams(n)
            places = words.within(np.arange(len(hashes)), n)
            every.append(hashes[places])
            owners.append(owner[words.documents(places)])
            sums.append(sums_of(LETTER_VALUES[raw], words.starts, n)[places])
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
