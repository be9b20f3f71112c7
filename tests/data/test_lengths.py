"""Rows by the length of documents: every token of a long document is read, rows begin where it does, fill is whole beginnings."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from minifoundation.data.lengths import Documents, LongRows, PackedRows, buckets
from minifoundation.data.loader import Loader, part_of, source_of
from minifoundation.data.samples import Order
from minifoundation.data.shards import Manifest, Shard, Shards
from minifoundation.data.tokenizer import BOS, EOS

LENGTHS = [[3, 40, 5, 17, 4], [16, 8, 2, 33, 15, 6, 7, 5, 4, 9]]
"""Of the documents of two shards: with rows of 16, long ones are of 8 and more."""


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    """Two shards whose tokens are all different, but for bos and eos."""
    made, number = [], 3
    for index, lengths in enumerate(LENGTHS):
        ids: list[int] = []
        for length in lengths:
            ids += [BOS, *range(number, number + length - 2), EOS]
            number += length - 2
        path = tmp_path / f"{index}.bin"
        np.array(ids, "<u2").tofile(path)
        made.append(Shard(path, np.dtype("<u2"), len(ids), len(lengths), len(ids)))
    return Shards(tmp_path, Manifest(dtype="uint16", tokenizer_sha256="", source={}, settings={}, complete=True), tuple(made), ())


def both(shards: Shards, min_tokens: int = 8, seq_len: int = 16, seed: int = 1) -> tuple[Documents, LongRows, PackedRows]:
    documents, order = Documents.of(shards.train, shards.manifest.eos), Order(shards, seq_len, 0)
    kinds = (kind(documents, order, min_tokens=min_tokens, seed=seed) for kind in (LongRows, PackedRows))
    return documents, *kinds  # type: ignore[return-value]


def test_documents_are_found(shards: Shards) -> None:
    documents = Documents.of(shards.train, shards.manifest.eos)
    assert documents.length.tolist() == [*LENGTHS[0], *LENGTHS[1]]
    for number, length in enumerate(documents.length):
        ids = documents.tokens(number)
        assert len(ids) == length and ids[0] == BOS and ids[-1] == EOS


def test_long_rows_hold_every_long_document(shards: Shards) -> None:
    documents, long, _ = both(shards)
    rows = long.rows(range(long.samples_per_epoch))
    assert rows.shape == (long.samples_per_epoch, 17)
    whole = {tuple(documents.tokens(number).tolist()): number for number in range(len(documents))}
    seen: dict[int, list[tuple[int, int]]] = {}
    for row in rows.tolist():
        begins = [place for place, token in enumerate(row) if token == BOS and place] + [17]
        head = row[: begins[0]]
        where = [
            (number, first) for ids, number in whole.items() for first in range(len(ids)) if ids[first : first + len(head)] == tuple(head)
        ]
        assert len(where) == 1, "a row begins with one piece of one document"
        (number, first), *_ = where
        assert documents.length[number] >= 8 and first % 16 == 0 and len(head) >= 8
        seen.setdefault(number, []).append((first, first + len(head)))
        for begin, end in itertools.pairwise(begins):
            assert any(ids[: end - begin] == tuple(row[begin:end]) for ids in whole if len(ids) < 8), "fill begins where a short one does"
    assert sorted(seen) == [number for number, length in enumerate(documents.length) if length >= 8]
    for number, parts in seen.items():
        covered = sorted(parts)
        assert covered[0][0] == 0 and all(a[1] - 1 == b[0] for a, b in itertools.pairwise(covered))
        assert documents.length[number] - covered[-1][1] < 8, "what is left is shorter than a long piece"


def test_packed_rows_are_the_short_documents_in_order(shards: Shards) -> None:
    documents, _, packed = both(shards)
    stream = np.concatenate([documents.tokens(number) for number in range(len(documents)) if documents.length[number] < 8])
    assert packed.samples_per_epoch == (len(stream) - 1) // 16
    rows = {tuple(row) for row in packed.rows(range(packed.samples_per_epoch)).tolist()}
    assert rows == {tuple(stream[first : first + 17].tolist()) for first in range(0, 16 * packed.samples_per_epoch, 16)}


def test_the_order_is_of_the_seed_and_the_number_alone(shards: Shards) -> None:
    _, long, _ = both(shards)
    _, again, _ = both(shards)
    _, other, _ = both(shards, seed=2)
    numbers = np.arange(3 * long.samples_per_epoch)
    rows = long.rows(numbers)
    assert np.array_equal(again.rows(numbers[::-1])[::-1], rows)
    assert not np.array_equal(other.rows(numbers), rows)
    epochs = np.split(rows[:, 0:1], 3)
    assert all(np.array_equal(np.sort(one, axis=0), np.sort(epochs[0], axis=0)) for one in epochs)


def test_shares_of_lengths_are_those_of_the_rows(shards: Shards) -> None:
    documents, long, packed = both(shards)
    share, count = 0.6, 400
    loader = Loader({"long": long, "short": packed}, {"long": share, "short": 1 - share})
    owner = {int(token): number for number in range(len(documents)) for token in documents.tokens(number)[1:-1]}
    found = np.zeros(len(documents))
    for row in loader.rows(range(count)).tolist():
        for before, token, after in zip([0, *row[:-1]], row, [*row[1:], 0], strict=True):
            whose = {BOS: after, EOS: before}.get(token, token)
            if whose in owner:
                found[owner[whose]] += 1
    expected = buckets(long, share)
    assert sum(bucket.corpus for bucket in expected) == pytest.approx(1) and sum(bucket.mix for bucket in expected) == pytest.approx(1)
    assert sum(bucket.documents for bucket in expected) == len(documents)
    for bucket in expected:
        here = (documents.length >= bucket.shortest) & (documents.length <= (bucket.longest or 10**9))
        assert found[here].sum() / found.sum() == pytest.approx(bucket.mix, abs=0.05)


def test_where_all_are_long_rows_are_filled_with_long_ones(shards: Shards) -> None:
    _, long, packed = both(shards, min_tokens=2)
    assert packed.samples_per_epoch == 0 and long.rows(range(long.samples_per_epoch)).min() > 0


@pytest.mark.parametrize("part", ["long", "short"])
def test_a_part_keeps_the_name_of_its_source(part: str) -> None:
    assert source_of(part_of("path/to (x).txt", part)) == ("path/to (x).txt", part)
    assert source_of("path/to (x).txt") == ("path/to (x).txt", None)
