"""The words of a stream of token ids, without decoding a byte of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minifoundation.evaluate.ngrams import (
    LETTER_VALUES,
    LETTERS,
    MARKS,
    WORD_POWERS,
    Bytes,
    Hashes,
    Places,
    Sums,
    Words,
    edges,
    mixed,
    spaced,
)

_OPENS, _BEGINS, _ENDS = 1, 2, 4
"""Of a run: a word begins with it whatever stands before; it begins with its token's first byte; it ends with its token's last one."""


def marks_never_spelled(encode: Callable[[str], Sequence[int]], surfaces: Sequence[bytes]) -> tuple[bytes, ...]:
    """Return those of ``MARKS`` of which no id holds a part, whatever stands beside them.

    It is not enough that a mark is an id: a byte-level BPE may merge a space with the first bytes of the mark behind it.
    """

    def spelled(mark: bytes) -> bool:
        character = mark.decode()
        beside = ("", " ", "a", "1", ".", "\n", character)
        texts = (f"{left}{character}{right}" for left in beside for right in beside)
        return any(not surfaces[token].replace(mark, b"").isascii() for text in texts for token in encode(text))

    return tuple(mark for mark in MARKS if not spelled(mark))


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
        marks: those of ``MARKS`` that separate words.
    """

    count: npt.NDArray[np.uint16]
    more: Places
    hashes: Hashes
    lengths: Places
    sums: Sums
    state: Bytes
    breaks: npt.NDArray[np.bool_]
    marks: tuple[bytes, ...]

    @classmethod
    def of(cls, surfaces: Sequence[bytes], *, breaks: Sequence[int], marks: tuple[bytes, ...] = ()) -> Vocabulary:
        """Return the vocabulary of ``surfaces``, the bytes of each id; the ids ``breaks`` end a document, ``marks`` a word."""
        texts = [b" " if token in breaks else spaced(surface, marks) for token, surface in enumerate(surfaces)]
        raw = np.frombuffer(b"".join(b" " + text for text in texts), np.uint8)  # the space parts the runs of two tokens
        size = np.array([len(text) for text in texts], np.int64)
        first = np.cumsum(size + 1) - size
        letters = LETTERS[raw]
        starts, ends = edges(letters)
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
        powers = WORD_POWERS.at_least(len(raw) + 1)
        hashed, summed = powers.sums(letters), np.concatenate([[0], np.cumsum(LETTER_VALUES[raw], dtype=np.uint32)])
        hashes[number] = (hashed[ends] - hashed[starts]) * powers.down[starts]
        sums[number] = summed[ends] - summed[starts]
        lengths[number] = ends - starts
        state[number] = np.where(starts == first[token], _BEGINS, _OPENS) + np.where(ends == (first + size)[token], _ENDS, 0)
        stops = np.zeros(total, bool)
        stops[[*breaks, -1]] = True
        return cls(np.maximum(runs, size > 0).astype(np.uint16), more, hashes, lengths, sums, state, stops, marks)

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
        powers = WORD_POWERS.at_least(int(places[-1]) + 1)
        total = np.zeros(len(runs) + 1, np.uint64)
        np.cumsum(self.hashes.take(runs) * powers.up.take(places[:-1]), out=total[1:])
        sums = total.take(np.append(starts, len(runs)))
        hashes = mixed((sums[1:] - sums[:-1]) * powers.down.take(places.take(starts)))
        return Words(hashes, starts, np.flatnonzero(self.breaks.take(runs)))
