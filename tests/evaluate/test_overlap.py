"""Hashes of words and n-grams against plain Python on strings."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from minifoundation.evaluate.overlap import BREAK, CHUNK, Index, Item, Scan, Vocabulary, Words, seen_in

PIECES = [
    b"",
    b"\x01",
    b"\x02",
    b" the",
    b"the",
    b" ",
    b"cat",
    b" Cat",
    b",",
    b"s. ",
    b"don't",
    b"a,b",
    b"\n\n",
    b"42",
    b"\xc3",
    b"\xa9t\xc3\xa9",
    b" \xe2\x98\x83 ",
]
ENDS = (1, 2)


def plain_words(text: str) -> list[str]:
    """Return the words of a text: runs of ASCII letters and digits and of anything beyond ASCII, in lower case."""
    return [word.lower() for word in re.findall(r"[0-9A-Za-z\x80-\U0010ffff]+", text)]


def plain_ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    words = [re.sub("[A-Z]", lambda letter: letter[0].lower(), word) for word in re.findall(r"[0-9A-Za-z\x80-\U0010ffff]+", text)]
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def raw(*documents: str) -> np.ndarray:
    return np.frombuffer(b"".join(text.encode() + bytes([BREAK]) for text in documents), np.uint8)


@pytest.mark.parametrize("seed", range(20))
def test_words_of_tokens_are_those_of_their_bytes(seed: int) -> None:
    tokens = np.array(random.Random(seed).choices(range(len(PIECES)), k=400))
    text = b"".join(bytes([BREAK]) if token in ENDS else PIECES[token] for token in tokens)
    ours, theirs = Vocabulary.of(PIECES, breaks=ENDS).words(tokens), Words.of(np.frombuffer(text, np.uint8))
    assert ours.hashes.tolist() == theirs.hashes.tolist() and len(ours.hashes) > 50
    every = np.arange(len(ours.hashes))
    assert ours.documents(every).tolist() == theirs.documents(every).tolist()


def test_equal_words_have_equal_hashes_and_others_do_not() -> None:
    text = "The cat, the CAT's hat; naïve NAÏVE 42x 4 2 été"
    hashes, words = Words.of(raw(text)).hashes.tolist(), plain_words(text)
    same = {(i, j) for i in range(len(words)) for j in range(len(words)) if words[i] == words[j]}
    assert {(i, j) for i in range(len(words)) for j in range(len(words)) if hashes[i] == hashes[j]} <= same
    assert hashes[0] == hashes[2] and hashes[1] == hashes[3]


@pytest.mark.parametrize("n", [1, 3, 8])
def test_found_ngrams_are_those_that_both_texts_have(n: int) -> None:
    vocabulary = [f"w{i}" for i in range(12)]
    chance = random.Random(n)
    fields = [" ".join(chance.choices(vocabulary, k=chance.randint(1, 30))) for _ in range(60)]
    documents = [" ".join(chance.choices(vocabulary, k=chance.randint(1, 40))) for _ in range(40)] + [fields[3], f"x {fields[7]} y"]
    items = [Item("bench", "task", str(i), (fields[i], fields[(i * 7) % 60])) for i in range(60)]
    index = Index([Item(f"bench{i}", "t", "", item.fields) for i, item in enumerate(items)], n)  # a label each: no templates
    scan = Scan([index])
    scan.read(Words.of(raw(*documents)))
    there = set().union(*(plain_ngrams(text, n) for text in documents))
    for item, share in zip(items, index.coverage(scan.seen[n]), strict=True):
        own = [gram for field in item.fields for gram in _list(field, n)]
        assert (np.isnan(share) and not own) or share == pytest.approx(sum(gram in there for gram in own) / len(own))


def _list(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def test_long_and_short_ngrams_are_found_in_one_pass() -> None:
    leak = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    part = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi"
    items = [Item("b", "t", "0", (leak,)), Item("b", "t", "1", (part,)), Item("b", "t", "2", ("too short",))]
    indexes = [Index(items, 13), Index(items, 8)]
    scan = Scan(indexes)
    scan.read(Words.of(raw(f"before {leak.upper()}, after", " ".join(part.split()[:9]), " ".join(part.split()[9:]))))
    assert indexes[0].coverage(scan.seen[13])[:2].tolist() == [1.0, 0.0]
    assert indexes[1].coverage(scan.seen[8])[:2].tolist() == [1.0, 2 / 7]
    assert np.isnan(indexes[0].coverage(scan.seen[13])[2])


def test_an_ngram_across_documents_or_fields_is_none() -> None:
    words = [f"w{i}" for i in range(16)]
    index = Index([Item("b", "t", "", (" ".join(words),)), Item("b", "t", "", (" ".join(words[:5]), " ".join(words[5:9])))], 8)
    scan = Scan([index])
    scan.read(Words.of(raw(" ".join(words[:7]), " ".join(words[7:14]))))
    assert index.coverage(scan.seen[8])[0] == 0 and np.isnan(index.coverage(scan.seen[8])[1])


def test_what_many_items_share_is_a_template() -> None:
    template = "which of the following statements about it is true or false"
    items = [Item("b", "t", "", (f"{template} x{i} a{i} b{i} c{i} d{i} e{i} f{i} g{i}",)) for i in range(20)]
    index = Index(items, 8)
    scan = Scan([index])
    scan.read(Words.of(raw(template)))
    assert not scan.seen[8].any()
    scan.read(Words.of(raw(f"{template} x3 a3 b3 c3")))
    assert np.flatnonzero(index.coverage(scan.seen[8])).tolist() == [3]


def test_an_ngram_across_the_cut_of_chunks_is_found() -> None:
    words = [f" w{i}".encode() for i in range(40)]
    vocabulary = Vocabulary.of([b"\x00", b"", *words, b" filler"], breaks=(1,))
    filler = len(words) + 2
    for place in (CHUNK - 20, CHUNK - 7, CHUNK - 1, CHUNK, 2 * CHUNK - 3):
        tokens = np.full(3 * CHUNK, filler, np.uint16)
        tokens[place : place + 13] = range(2, 15)
        index = Index([Item("b", "t", "", (b"".join(words[:13]).decode(),))], 13)
        assert seen_in(tokens, vocabulary, [index])[13].all(), place


def test_no_items_and_no_text_find_nothing() -> None:
    empty = Index([], 8)
    assert seen_in(np.array([1, 1]), Vocabulary.of([b"", b""], breaks=(1,)), [empty])[8].size == 0
    index = Index([Item("b", "t", "", ("a b c d e f g h i",))], 8)
    assert not seen_in(np.array([], np.uint16), Vocabulary.of([b"x"], breaks=()), [index])[8].any()
