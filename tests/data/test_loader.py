"""Samples by number: each once an epoch, in an order that depends on the seed and the number alone, however the shards came to be."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minifoundation.data.batch import Batch, prefetch
from minifoundation.data.loader import Loader, micro_batches
from minifoundation.data.samples import Samples
from minifoundation.data.shards import Shards
from minifoundation.errors import UserError
from tests.data.growing import Folder, shards_of

CPU = torch.device("cpu")


def alone(shards: Shards, *, seq_len: int, seed: int, first_shard: int = 0) -> Loader:
    """Return the loader of one source."""
    return Loader({"one": Samples(shards, seq_len=seq_len, seed=seed, first_shard=first_shard)}, {"one": 1.0})


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Return shard lengths of which at least one holds a sample, seq_len, first_shard."""
    seq_len = draw(st.integers(1, 9))
    lengths = [*draw(st.lists(st.integers(1, 60), min_size=1, max_size=5)), seq_len + 1]
    return lengths, seq_len, draw(st.integers(0, len(lengths) - 1))


relaxed = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)


@relaxed
@given(corpus=corpora(), seed=st.integers(0, 2**63))
def test_each_sample_comes_exactly_once_an_epoch(tmp_path: Path, corpus: tuple[list[int], int, int], seed: int) -> None:
    lengths, seq_len, first_shard = corpus
    shards = shards_of(tmp_path, lengths)
    loader = Samples(shards, seq_len=seq_len, seed=seed, first_shard=first_shard)
    expected: Counter[tuple[int, ...]] = Counter()
    for shard in shards.train:
        ids = shard.tokens().tolist()
        expected.update(tuple(ids[i * seq_len : i * seq_len + seq_len + 1]) for i in range((len(ids) - 1) // seq_len))
    n = loader.samples_per_epoch
    assert n is not None and n == expected.total()
    for epoch in range(2):
        rows = loader.rows(range(epoch * n, (epoch + 1) * n))
        assert Counter(map(tuple, rows.tolist())) == expected

        firsts = [shard.tokens()[0] for shard in shards.train]
        turns = [(int(np.searchsorted(firsts, row[0], side="right")) - 1 - first_shard) % len(lengths) for row in rows]
        assert turns == sorted(turns)


@relaxed
@given(corpus=corpora(), seed=st.integers(0, 2**32), samples=st.lists(st.integers(0, 500), min_size=1, max_size=20))
def test_a_sample_is_a_pure_function_of_seed_and_number(
    tmp_path: Path, corpus: tuple[list[int], int, int], seed: int, samples: list[int]
) -> None:
    lengths, seq_len, first_shard = corpus
    shards = shards_of(tmp_path, lengths)
    together = alone(shards, seq_len=seq_len, seed=seed, first_shard=first_shard).rows(samples)
    for sample, row in zip(samples, together, strict=True):
        single = alone(shards, seq_len=seq_len, seed=seed, first_shard=first_shard).rows([sample])[0]
        assert single.tolist() == row.tolist()


def test_the_order_is_pinned(tmp_path: Path) -> None:
    """A run must go on in the same order under another version of numpy."""
    loader = Samples(shards_of(tmp_path, [21, 13]), seq_len=2, seed=1234)
    assert loader.samples_per_epoch == 16
    first_epoch = [4, 18, 16, 2, 14, 0, 8, 6, 10, 12, 31, 29, 27, 23, 25, 21]
    second_epoch = [16, 14, 18, 12, 10, 8, 4, 0, 2, 6, 21, 31, 27, 23, 29, 25]
    assert loader.rows(range(32))[:, 0].tolist() == first_epoch + second_epoch


def test_seed_epoch_and_shard_change_the_order(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, [101, 101])
    n = 100
    first = alone(shards, seq_len=1, seed=1)
    orders = [first.rows(range(start, start + n))[:, 0] for start in (0, n, 2 * n)]
    orders[1] -= 101
    orders.append(alone(shards, seq_len=1, seed=2).rows(range(n))[:, 0])
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


@relaxed
@given(corpus=corpora(), data=st.data())
def test_a_growing_folder_gives_the_order_of_the_grown_one(tmp_path: Path, corpus: tuple[list[int], int, int], data: st.DataObject) -> None:
    lengths, seq_len, first_shard = corpus
    folder = Folder(tmp_path, lengths)
    grown = Samples(folder.grow(len(lengths), complete=True), seq_len=seq_len, seed=3, first_shard=first_shard)
    assert grown.samples_per_epoch is not None
    expected = grown.rows(range(2 * grown.samples_per_epoch)).tolist()

    growing = Samples(folder.grow(0), seq_len=seq_len, seed=3, first_shard=first_shard)
    read = 0
    for pairs in sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=4))):
        folder.grow(pairs)
        there = sum((n - 1) // seq_len for n in lengths[first_shard:pairs])
        assert growing.has(there) and not growing.has(there + 1) and growing.samples_per_epoch is None
        until = data.draw(st.integers(read, there))
        if until > read:
            assert growing.rows(range(read, until)).tolist() == expected[read:until]
        read = until
    folder.grow(len(lengths), complete=True)
    if read < len(expected):
        assert growing.rows(range(read, len(expected))).tolist() == expected[read:]


def test_a_sample_that_is_still_being_made_is_waited_for(tmp_path: Path) -> None:
    folder = Folder(tmp_path, [41, 41])
    loader = alone(folder.grow(1), seq_len=4, seed=0)
    found: list[list[list[int]]] = []
    thread = threading.Thread(target=lambda: found.append(loader.rows(range(9, 11)).tolist()))
    thread.start()
    thread.join(0.5)
    assert thread.is_alive()
    folder.grow(2)
    thread.join(5)
    assert found == [alone(folder.grow(2), seq_len=4, seed=0).rows(range(9, 11)).tolist()]


def test_a_wait_ends_when_the_loader_is_stopped(tmp_path: Path) -> None:
    loader = alone(Folder(tmp_path, [41, 41]).grow(1), seq_len=4, seed=0)
    threading.Timer(0.2, loader.stop).start()
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="stopped while waiting"):
        loader.rows([10])
    assert time.monotonic() - began < 5


@settings(relaxed, max_examples=15)
@given(
    lengths=st.lists(st.lists(st.integers(8, 60), min_size=1, max_size=4), min_size=2, max_size=4),
    pairs=st.lists(st.integers(0, 4), min_size=4, max_size=4),
    data=st.data(),
)
def test_a_mixture_reads_each_source_in_its_own_order(
    tmp_path: Path, lengths: list[list[int]], pairs: list[int], data: st.DataObject
) -> None:
    names = [f"s{number}" for number in range(len(lengths))]
    weights = dict(zip(names, data.draw(st.lists(st.integers(1, 9).map(float), min_size=4, max_size=4)), strict=False))
    folders = [Folder(tmp_path / name, of_one, first_id=10_000 * n) for n, (name, of_one) in enumerate(zip(names, lengths, strict=True))]
    whole = {name: Samples(f.grow(9, complete=True), seq_len=7, seed=5) for name, f in zip(names, folders, strict=True)}
    loader = Loader(dict(reversed(whole.items())), weights)  # the order of the names does not matter
    rows = loader.rows(range(200)).tolist()
    for number, name in enumerate(names):
        own = [row for row in rows if row[0] // 10_000 == number]
        assert len(own) == loader.counts(200)[name]
        assert own == (whole[name].rows(range(len(own))).tolist() if own else [])

    part = {name: Samples(f.grow(n), seq_len=7, seed=5) for name, f, n in zip(names, folders, pairs, strict=False)}
    growing = Loader(part, weights)
    reach = growing.reach(200)
    assert growing.has(reach) and not any(growing.has(samples) for samples in range(reach + 1, 201))
    if reach:
        assert growing.rows(range(reach)).tolist() == rows[:reach]


@settings(relaxed, max_examples=15)
@given(seed=st.integers(0, 2**32), epochs=st.integers(1, 3))
def test_every_sample_comes_once_an_epoch_through_interruptions_and_other_numbers_of_ranks(tmp_path: Path, seed: int, epochs: int) -> None:
    """A run is killed again and again, goes on from its last checkpoint on 1, 2 or 3 ranks, while its shards are being made."""
    chance = random.Random(seed)
    folder = Folder(tmp_path, [51, 21, 77, 33, 60])
    per_epoch = sum((n - 1) // 4 for n in (51, 21, 77, 33, 60))
    rows_a_step = 6
    steps = epochs * per_epoch // rows_a_step
    known, saved = 1, 0
    counted: Counter[tuple[int, ...]] = Counter()
    while saved < steps:
        ranks = chance.choice([1, 2, 3])
        loaders = [alone(folder.grow(known, complete=known == 5), seq_len=4, seed=seed) for _ in range(ranks)]
        since: Counter[tuple[int, ...]] = Counter()
        for step in range(saved, steps):
            while not all(loader.has((step + 1) * rows_a_step) for loader in loaders):
                known += 1
                folder.grow(known, complete=known == 5)
            for rank, loader in enumerate(loaders):
                split = {"batch_size": chance.choice([1, 2]) if ranks < 3 else 1, "rank": rank, "world_size": ranks}
                split["batch_size"] = 1 if ranks > 1 else split["batch_size"]
                for batch in micro_batches(loader, step * rows_a_step, grad_accum=rows_a_step // ranks // split["batch_size"], **split):
                    since.update(map(tuple, torch.cat([batch.tokens, batch.targets[:, -1:]], dim=1).tolist()))
            if chance.random() < 0.3:
                saved, since = step + 1, counted.update(since) or Counter()
            if chance.random() < 0.2:
                break
        else:
            saved = steps
            counted.update(since)
    seen = steps * rows_a_step
    assert counted.total() == seen
    assert set(counted.values()) <= {seen // per_epoch, -(-seen // per_epoch)}


@relaxed
@given(rows=st.sampled_from([12, 24]), sample=st.integers(0, 100))
def test_a_step_reads_the_same_samples_on_any_number_of_ranks(tmp_path: Path, rows: int, sample: int) -> None:
    loader = alone(shards_of(tmp_path, [300, 100]), seq_len=5, seed=7)
    expected = sorted(loader.rows(range(sample, sample + rows)).tolist())
    for world_size, batch_size in itertools.product((1, 2, 3), (1, 2)):
        grad_accum = rows // (world_size * batch_size)
        found = []
        for rank in range(world_size):
            ranks_own = list(micro_batches(loader, sample, batch_size=batch_size, grad_accum=grad_accum, rank=rank, world_size=world_size))
            assert len(ranks_own) == grad_accum
            for batch in ranks_own:
                assert batch.tokens.shape == batch.targets.shape == (batch_size, 5)
                found += torch.cat([batch.tokens, batch.targets[:, -1:]], dim=1).tolist()
        assert sorted(found) == expected


def test_targets_are_the_next_tokens(tmp_path: Path) -> None:
    batch = alone(shards_of(tmp_path, [40]), seq_len=8, seed=0).batch([0, 1])
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.tokens.is_contiguous()
    assert torch.equal(batch.targets, batch.tokens + 1)


def test_documents_are_marked_when_asked_for(tmp_path: Path) -> None:
    samples = {"one": Samples(shards_of(tmp_path, [40]), seq_len=8, seed=0)}
    assert Loader(samples, {"one": 1.0}).batch([0]).cu_seqlens is None
    assert Loader(samples, {"one": 1.0}, mask_documents=True).batch([0]).cu_seqlens is not None


def test_a_corpus_shorter_than_one_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.seq_len: 8 is longer than the corpus \(13 training tokens in 2 shards of .*; shorten it"):
        Samples(shards_of(tmp_path, [8, 5]), seq_len=8, seed=0)


def steps(n: int) -> Iterator[list[Batch]]:
    for step in range(n):
        yield [Batch.of_rows(np.full((1, 3), step))]


def test_prefetch_hands_over_every_step_in_order() -> None:
    with prefetch(steps(20), CPU) as batches:
        assert [int(step[0].tokens[0, 0]) for step in batches] == list(range(20))
    assert all(thread.name != "data" for thread in threading.enumerate())


def test_prefetch_reads_ahead_and_no_further() -> None:
    read: list[list[Batch]] = []

    def watched() -> Iterator[list[Batch]]:
        for step in steps(50):
            read.append(step)
            yield step

    with prefetch(watched(), CPU, ahead=3) as batches:
        next(batches)
        time.sleep(0.3)
        assert 2 < len(read) <= 5  # one handed over, three waiting, one in the thread's hand
    assert len(read) <= 5


def test_what_goes_wrong_while_reading_ahead_is_raised_where_it_is_read() -> None:
    def broken() -> Iterator[list[Batch]]:
        yield from steps(2)
        raise UserError("train-00000.bin", "is missing", "prepare again")

    with prefetch(broken(), CPU) as batches:
        assert len(list(itertools.islice(batches, 2))) == 2
        with pytest.raises(UserError, match="is missing"):
            next(batches)


def test_leaving_prefetch_stops_its_thread_while_it_waits() -> None:
    with pytest.raises(KeyError), prefetch(steps(10_000), CPU) as batches:  # noqa: PT012
        next(batches)
        raise KeyError
    assert all(thread.name != "data" for thread in threading.enumerate())


@pytest.mark.gpu
def test_batches_on_a_gpu_are_whole_when_they_are_read_though_nothing_waits_for_their_copies() -> None:
    """Long rows, whose copies take a while, and memory that is given back and taken again at once."""
    device = torch.device("cuda", 0)
    wide = ([Batch.of_rows(np.full((4, 262_145), step)) for _ in range(2)] for step in range(30))
    sums = []
    with prefetch(wide, device) as batches:
        torch.cuda.set_sync_debug_mode("error")
        try:
            for micro in batches:
                assert all(batch.tokens.is_cuda and batch.targets.is_cuda for batch in micro)
                sums.append(torch.stack([x.sum() for batch in micro for x in (batch.tokens, batch.targets)]))
                del micro
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert [row.tolist() for row in sums] == [[step * 4 * 262_144] * 4 for step in range(30)]
