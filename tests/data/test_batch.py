"""What a micro-batch carries; documents found in rows against a plain loop."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from minifoundation.data.batch import Batch
from minifoundation.data.tokenizer import BOS, EOS


def documents_of(row: list[int]) -> list[list[int]]:
    """Return the documents in a row, the last of which may be cut off."""
    documents: list[list[int]] = []
    for place, token in enumerate(row):
        if place == 0 or row[place - 1] == EOS:
            documents.append([])
        documents[-1].append(token)
    return documents


ROWS = st.integers(2, 12).flatmap(
    lambda length: st.lists(st.lists(st.sampled_from([BOS, EOS, 7, 8]), min_size=length, max_size=length), min_size=1, max_size=4)
)


@given(ROWS)
def test_documents_are_those_a_plain_loop_finds(rows: list[list[int]]) -> None:
    batch = Batch.of_rows(np.array(rows, dtype=np.int64), mask_documents=True)
    expected = [document for row in rows for document in documents_of(row[:-1])]
    assert batch.cu_seqlens is not None and batch.cu_seqlens.dtype == torch.int32
    found = [part.tolist() for part in batch.tokens.flatten().tensor_split(batch.cu_seqlens[1:-1].long())]
    assert found == expected
    assert batch.cu_seqlens[-1] == batch.tokens.numel()
    pairs = sum(len(document) ** 2 for document in expected)
    assert batch.attended_length == pairs / batch.tokens.numel()


def test_without_masking_a_batch_knows_of_no_documents() -> None:
    rows = np.array([[BOS, 5, EOS, BOS, 6], [7, EOS, BOS, 8, 9]])
    plain, masked = Batch.of_rows(rows), Batch.of_rows(rows, mask_documents=True)
    assert plain.cu_seqlens is None and plain.attended_length == 4
    assert torch.equal(plain.tokens, torch.tensor([[1, 5, 2, 1], [7, 2, 1, 8]])) and torch.equal(plain.tokens, masked.tokens)
    assert torch.equal(plain.targets, torch.tensor([[5, 2, 1, 6], [2, 1, 8, 9]])) and torch.equal(plain.targets, masked.targets)
    assert masked.cu_seqlens is not None and masked.cu_seqlens.tolist() == [0, 3, 4, 6, 8]


def test_documents_end_at_the_eos_of_their_tokenizer() -> None:
    rows = np.array([[5, 9, 6, EOS, 7, 9, 8]])
    masked = Batch.of_rows(rows, mask_documents=True, eos=9)
    assert masked.cu_seqlens is not None and masked.cu_seqlens.tolist() == [0, 2, 6]


def test_a_moved_batch_keeps_its_documents() -> None:
    batch = Batch.of_rows(np.array([[5, EOS, BOS, 6]]), mask_documents=True)
    moved = batch.to(torch.device("meta"))
    assert moved.cu_seqlens is not None
    assert {moved.tokens.device.type, moved.targets.device.type, moved.cu_seqlens.device.type} == {"meta"}
    assert moved.attended_length == batch.attended_length == (4 + 1) / 3
    assert Batch.of_rows(np.array([[BOS, 5, 6]])).to(torch.device("meta")).cu_seqlens is None


@given(ROWS, st.booleans())
def test_a_part_has_its_tokens_and_what_is_said_of_whole_rows(rows: list[list[int]], masked: bool) -> None:
    batch = Batch.of_rows(np.array(rows, dtype=np.int64), mask_documents=masked)
    length = batch.tokens.shape[1]
    part = batch.part([(length // 2, length), (0, 1)])
    for whole, mine in ((batch.tokens, part.tokens), (batch.targets, part.targets)):
        assert mine.tolist() == [[*row[length // 2 :], row[0]] for row in whole.tolist()]
    assert part.attended_length == batch.attended_length
    assert part.cu_seqlens is batch.cu_seqlens
