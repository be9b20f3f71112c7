"""The held-out rows: the same whenever they are asked for, and the bytes of their text exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minifoundation.data.held_out import HeldOut
from minifoundation.data.loader import Loader
from minifoundation.data.samples import Samples
from minifoundation.data.shards import Shards
from tests.data.growing import Folder, shards_of

relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)


def two_a_token(ids: npt.NDArray[np.int64]) -> int:
    return 2 * ids.size


def of(
    shards: Shards, *, seq_len: int, samples: int = 10**6, tokens: int, batch_size: int = 2, first_shard: int = 0, share: float = 0.1
) -> HeldOut:
    loader = Loader({"one": Samples(shards, seq_len=seq_len, seed=0, first_shard=first_shard)}, {"one": 1.0})
    return HeldOut(loader, samples=samples, tokens=tokens, batch_size=batch_size, text_bytes=two_a_token, share=share)


@relaxed
@given(
    lengths=st.lists(st.integers(1, 30), max_size=4),
    seq_len=st.integers(1, 12),
    batch_size=st.integers(1, 4),
    tokens=st.integers(1, 100),
)
def test_held_out_rows_follow_one_another(tmp_path: Path, lengths: list[int], seq_len: int, batch_size: int, tokens: int) -> None:
    shards = shards_of(tmp_path, [20], lengths)
    total = sum(lengths)
    held_out = of(shards, seq_len=seq_len, tokens=tokens, batch_size=batch_size)
    assert held_out.ready()
    batches = held_out.batches
    n_rows = sum(len(batch.tokens) for batch in batches)
    read = [token for batch in batches for token in batch.tokens.flatten().tolist()]
    assert read == list(range(20, 20 + n_rows * seq_len))
    assert all(torch.equal(batch.targets, batch.tokens + 1) for batch in batches)
    assert [len(batch.tokens) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert n_rows == (0 if total <= seq_len else min((total - 1) // seq_len, max(1, tokens // seq_len)))
    if batches:
        assert held_out.bytes_per_token == 2.0


@relaxed
@given(
    train=st.lists(st.integers(5, 40), min_size=1, max_size=6),
    held=st.lists(st.integers(1, 20), min_size=6, max_size=6),
    samples=st.integers(1, 30),
    tokens=st.integers(1, 60),
    first_shard=st.integers(0, 2),
)
def test_the_rows_do_not_depend_on_when_they_are_asked_for(
    tmp_path: Path, train: list[int], held: list[int], samples: int, tokens: int, first_shard: int
) -> None:
    folder = Folder(tmp_path, train, held[: len(train)])
    known: list[list[Any]] = []
    for pairs in range(len(train) + 1):
        for complete in (False, True) if pairs == len(train) else (False,):
            one = of(folder.grow(pairs, complete=complete), seq_len=4, samples=samples, tokens=tokens, first_shard=first_shard)
            if one.ready():
                known.append([batch.tokens.tolist() for batch in one.batches])
            else:
                assert not known
    assert known and all(rows == known[0] for rows in known)


def test_nothing_is_known_before_enough_is_there(tmp_path: Path) -> None:
    folder = Folder(tmp_path, [41, 41, 41], [9, 9, 9])
    one = of(folder.grow(1), seq_len=4, samples=20, tokens=16)
    assert not one.ready()  # 16 tokens need 17 ids, and the run goes on reading
    folder.grow(2)
    assert one.ready()
    assert torch.cat([batch.tokens for batch in one.batches]).flatten().tolist() == list(range(123, 139))
    few = of(folder.grow(1), seq_len=4, samples=10, tokens=16)
    assert few.ready() and sum(len(batch.tokens) for batch in few.batches) == 2  # the first pair is all that the run reads


def test_a_source_without_a_row_is_named_once_that_is_known(tmp_path: Path) -> None:
    folder = Folder(tmp_path, [41, 41], [3, 9])
    one = of(folder.grow(1), seq_len=4, samples=20, tokens=16)
    assert one.lacking() == []  # the second pair may hold some
    folder.grow(2)
    assert one.lacking() == []
    (line,) = of(folder.grow(1), seq_len=4, samples=10, tokens=16).lacking()  # all that the run reads
    assert line.startswith("warning: data.held_out: too few documents of the shards that are read fell into it")
    assert of(folder.grow(1), seq_len=4, samples=10, tokens=16, share=0.0).lacking() == [], "on purpose"


def test_of_a_mixture_the_source_that_lacks_rows_is_named(tmp_path: Path) -> None:
    sources = {name: Samples(shards_of(tmp_path / name, [50], held), seq_len=4, seed=0) for name, held in (("a", [100]), ("b", [3]))}
    held_out = HeldOut(Loader(sources, {"a": 1.0, "b": 1.0}), samples=20, tokens=64, batch_size=8, text_bytes=two_a_token, share=0.1)
    (line,) = held_out.lacking()
    assert "too few documents of the shards of b that are read" in line


def test_a_mixture_is_evaluated_by_weight(tmp_path: Path) -> None:
    sources = {
        name: Samples(shards_of(tmp_path / name, [50], [100], first_id=1000 * n), seq_len=4, seed=0) for n, name in enumerate(("a", "b"))
    }
    held_out = HeldOut(Loader(sources, {"a": 3.0, "b": 1.0}), samples=20, tokens=64, batch_size=8, text_bytes=two_a_token, share=0.1)
    rows = torch.cat([batch.tokens for batch in held_out.batches])
    assert (rows[:, 0] // 1000).tolist() == [0] * 12 + [1] * 4


def test_bytes_are_those_of_the_targets_alone(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, [50], [13])

    def evens(ids: npt.NDArray[np.int64]) -> int:
        return int((ids % 2 == 0).sum())

    loader = Loader({"one": Samples(shards, seq_len=4, seed=0)}, {"one": 1.0})
    held_out = HeldOut(loader, samples=5, tokens=100, batch_size=8, text_bytes=evens, share=0.1)
    assert held_out.bytes_per_token == 6 / 12  # targets 51 to 62
