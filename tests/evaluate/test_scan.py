"""The n-grams that a stream of tokens shares with items, against plain Python on strings."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import numpy as np
import pytest

from minifoundation.evaluate import scan as scan_module
from minifoundation.evaluate.ngrams import BREAK, Index, Item
from minifoundation.evaluate.scan import CHUNK, Scan, Sieve
from minifoundation.evaluate.vocabulary import Vocabulary, marks_never_spelled
from tests.evaluate.pieces import ENDS, PIECES, raw

BYTES = Vocabulary.of([bytes([value]) for value in range(256)], breaks=(BREAK,))


def plain_ngrams(text: bytes, n: int) -> list[tuple[bytes, ...]]:
    words = [word.lower() for word in re.findall(rb"[0-9A-Za-z\x80-\xfe]+", text)]  # of bytes, lower() changes ASCII alone
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def scanned(indexes: list[Index], *documents: str) -> Scan:
    scan = Scan(BYTES, indexes)
    scan.read(raw(*documents))
    return scan


@pytest.mark.parametrize("chunk", [40, 333, CHUNK])
@pytest.mark.parametrize("seed", range(6))
def test_found_ngrams_are_those_that_both_texts_have(seed: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "CHUNK", chunk)
    monkeypatch.setattr(scan_module, "TOGETHER", chunk // 4)
    chance = random.Random(seed)
    pieces = chance.sample(PIECES[3:], 6)  # few, so that texts have much in common
    tokens = [PIECES.index(piece) for piece in pieces]
    stream = [token for _ in range(60) for token in (*chance.choices([0, *tokens], k=chance.randint(0, 60)), chance.choice(ENDS))]
    documents = b"".join(b"\n\xff" if token in ENDS else PIECES[token].replace(b"\xff", b"!") for token in stream).split(b"\n\xff")
    fields = [b"".join(chance.choices(pieces, k=40)).decode("utf-8", "ignore") for _ in range(60)]
    items = [Item(f"bench{i}", "task", str(i), (fields[i], fields[(i * 7) % 60])) for i in range(60)]  # a label each: no templates
    indexes = [Index(items, n) for n in (5, 2, 3)]
    scan = Scan(Vocabulary.of(PIECES, breaks=ENDS), indexes)
    scan.read(np.array(stream, np.uint16))
    some = 0
    for index in indexes:
        there = {gram for document in documents for gram in plain_ngrams(document, index.n)}
        for item, share in zip(items, index.coverage(scan.seen[index.n]), strict=True):
            own = [gram for field in item.fields for gram in plain_ngrams(field.encode(), index.n)]
            assert (np.isnan(share) and not own) or share == pytest.approx(sum(gram in there for gram in own) / len(own))
            some += 0 < share < 1
    assert some > 20, "else this test is blind"


def test_few_pass_the_sieve_and_none_of_its_own_is_held_back() -> None:
    chance = np.random.default_rng(0)
    own, others = (chance.integers(0, 1 << 32, 200_000, dtype=np.uint32) for _ in range(2))
    sieve = Sieve(own)
    assert sieve.passed(own).tolist() == list(range(200_000))
    assert len(sieve.passed(others)) < 200_000 / 200


def test_long_and_short_ngrams_are_found_in_one_pass() -> None:
    leak = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    part = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi"
    items = [Item("b", "t", "0", (leak,)), Item("b", "t", "1", (part,)), Item("b", "t", "2", ("too short",))]
    indexes = [Index(items, 13), Index(items, 8)]
    scan = scanned(indexes, f"before {leak.upper()}, after", " ".join(part.split()[:9]), " ".join(part.split()[9:]))
    assert indexes[0].coverage(scan.seen[13])[:2].tolist() == [1.0, 0.0]
    assert indexes[1].coverage(scan.seen[8])[:2].tolist() == [1.0, 2 / 7]
    assert np.isnan(indexes[0].coverage(scan.seen[13])[2])


def test_curly_quotes_and_dashes_separate_where_they_are_whole() -> None:
    """A vocabulary that spells them in bytes has them as letters, and so have the items then."""
    straight, curly = "it's a so-called 'thing' I say", "it\u2019s a so\u2013called \u2018thing\u2019\u00a0I say"
    items = [Item("b", "t", "0", (straight,)), Item("b", "t", "1", (curly,))]
    pieces = [*(bytes([value]) for value in range(256)), *(mark.encode() for mark in "\u2019\u2013\u2018\u00a0")]
    pieces += ["\u2019\u00a0I".encode()]  # a longer one with two of them
    whole = Vocabulary.of(pieces, breaks=(BREAK,), marks=marks_never_spelled(longest_first(pieces), pieces))
    places = {piece: token for token, piece in enumerate(pieces)}
    before, after = ([places[letter.encode()] for letter in part] for part in curly.split("\u2019\u00a0I"))
    tokens = [*before, len(pieces) - 1, *after]
    for vocabulary, text, expected in ((whole, np.array([*tokens, BREAK]), [1.0, 1.0]), (BYTES, raw(curly), [0.0, 1.0])):
        index = Index(items, 5, vocabulary.marks)
        scan = Scan(vocabulary, [index])
        scan.read(text)
        assert index.coverage(scan.seen[5]).tolist() == expected
    assert BYTES.marks == () and len(whole.marks) == 4


def test_a_mark_whose_bytes_a_vocabulary_merges_with_what_stands_before_it_is_a_letter() -> None:
    """As in a byte-level BPE: the quote and the space are ids, but a space goes with the first bytes of a quote behind it."""
    pieces = [*(bytes([value]) for value in range(256)), "\u2019".encode(), "\u00a0".encode(), b" \xe2\x80"]
    encode = longest_first(pieces)
    vocabulary = Vocabulary.of(pieces, breaks=(BREAK,), marks=marks_never_spelled(encode, pieces))
    assert vocabulary.marks == ("\u00a0".encode(),)
    text = "five of us \u2019 are here\u00a0now"
    index = Index([Item("b", "t", "0", (text,))], 5, vocabulary.marks)
    scan = Scan(vocabulary, [index])
    scan.read(np.array([*encode(text), BREAK]))
    assert index.coverage(scan.seen[5]).tolist() == [1.0]


def longest_first(pieces: list[bytes]) -> Callable[[str], list[int]]:
    """Return what takes the longest piece there is at each place."""
    ids = {piece: token for token, piece in enumerate(pieces)}

    def encode(text: str) -> list[int]:
        left, tokens = text.encode(), []
        while left:
            size = next(size for size in range(min(8, len(left)), 0, -1) if left[:size] in ids)
            tokens.append(ids[left[:size]])
            left = left[size:]
        return tokens

    return encode


def test_an_ngram_across_documents_or_fields_is_none() -> None:
    words = [f"w{i}" for i in range(16)]
    index = Index([Item("b", "t", "", (" ".join(words),)), Item("b", "t", "", (" ".join(words[:5]), " ".join(words[5:9])))], 8)
    scan = scanned([index], " ".join(words[:7]), " ".join(words[7:14]))
    assert index.coverage(scan.seen[8])[0] == 0 and np.isnan(index.coverage(scan.seen[8])[1])


def test_an_ngram_across_the_cut_of_chunks_is_found() -> None:
    words = [f" w{i}".encode() for i in range(40)]
    vocabulary = Vocabulary.of([b"\x00", b"", *words, b" filler"], breaks=(1,))
    filler = len(words) + 2
    for place in (CHUNK - 20, CHUNK - 7, CHUNK - 1, CHUNK, 2 * CHUNK - 3):
        tokens = np.full(3 * CHUNK, filler, np.uint16)
        tokens[place : place + 13] = range(2, 15)
        index = Index([Item("b", "t", "", (b"".join(words[:13]).decode(),))], 13)
        scan = Scan(vocabulary, [index])
        scan.read(tokens)
        assert scan.seen[13].all(), place


def test_a_word_longer_than_a_chunk_hides_nothing_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "CHUNK", 32)
    index = Index([Item("b", "t", "", ("one two three four five",)), Item("b", "t", "", ("x one two three four",))], 5)
    for length in (20, 31, 32, 33, 64, 100, 300):
        scan = scanned([index], f"{'x' * length} one two three four five {'x' * length} y")
        assert index.coverage(scan.seen[5]).tolist() == [1.0, 0.0], length


def test_no_items_and_no_text_find_nothing() -> None:
    empty = Index([], 8)
    scan = Scan(Vocabulary.of([b"", b""], breaks=(1,)), [empty])
    scan.read(np.array([1, 0, 1]))
    assert scan.seen[8].size == 0
    index = Index([Item("b", "t", "", ("a b c d e f g h i",))], 8)
    scan = Scan(Vocabulary.of([b"x"], breaks=()), [index])
    scan.read(np.array([], np.uint16))
    assert not scan.seen[8].any()
