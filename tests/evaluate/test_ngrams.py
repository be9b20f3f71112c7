"""Hashes of words and n-grams against plain Python on strings."""

from __future__ import annotations

import re

import numpy as np

from minifoundation.evaluate.ngrams import Index, Item, Words
from tests.evaluate.pieces import raw


def plain_words(text: str) -> list[str]:
    """Return the words of a text: runs of ASCII letters and digits and of anything beyond ASCII, in lower case."""
    return [word.lower() for word in re.findall(r"[0-9A-Za-z\x80-\U0010ffff]+", text)]


def test_equal_words_have_equal_hashes_and_others_do_not() -> None:
    text = "The cat, the CAT's hat; naïve NAÏVE 42x 4 2 été"
    hashes, words = Words.of(raw(text)).hashes.tolist(), plain_words(text)
    same = {(i, j) for i in range(len(words)) for j in range(len(words)) if words[i] == words[j]}
    assert {(i, j) for i in range(len(words)) for j in range(len(words)) if hashes[i] == hashes[j]} <= same
    assert hashes[0] == hashes[2] and hashes[1] == hashes[3]


def test_what_many_items_share_is_a_template() -> None:
    template = "which of the following statements about it is true or false"
    items = [Item("b", "t", "", (f"{template} x{i} a{i} b{i} c{i} d{i} e{i} f{i} g{i}",)) for i in range(20)]
    index = Index(items, 8)

    def covered(text: str) -> list[int]:
        seen = np.zeros(len(index.hashes), bool)
        _, numbers = index.found(Words.of(raw(text)).ngrams(8))
        seen[numbers] = True
        assert seen.any()
        return np.flatnonzero(index.coverage(seen)).tolist()

    assert covered(template) == []
    assert covered(f"{template} x3 a3 b3 c3") == [3]
