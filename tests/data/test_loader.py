import itertools
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
from minifoundation.data.loader import Loader, held_out_batches, micro_batches
from minifoundation.data.shards import Manifest, Pair, Record, Shards, write_manifest
from minifoundation.errors import UserError


def shards_of(folder: Path, train: list[int], held_out: list[int] | None = None) -> Shards:
    """Return shards of the given lengths; no id occurs twice, so that each place can be recognised."""
    numbers = itertools.count()

    def made(name: str, lengths: list[int]) -> list[Record]:
        records = []
        for index, n in enumerate(lengths):
            file = f"{name}-{index:05d}.bin"
            np.array([next(numbers) for _ in range(n)], dtype="<u4").tofile(folder / file)
            records.append(Record(file=file, tokens=n, documents=1, text_bytes=3 * n, sha256=""))
        return records

    pairs = itertools.zip_longest(made("train", train), made("held_out", held_out or []))
    named = tuple(Pair(train=of_train, held_out=of_held_out) for of_train, of_held_out in pairs)
    write_manifest(folder, Manifest(dtype="uint32", tokenizer_sha256="", source={}, settings={}, pairs=named))
    return Shards.open(folder)


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
    loader = Loader(shards, seq_len=seq_len, seed=seed, first_shard=first_shard)
    expected: Counter[tuple[int, ...]] = Counter()
    for shard in shards.train:
        ids = shard.tokens().tolist()
        expected.update(tuple(ids[i * seq_len : i * seq_len + seq_len + 1]) for i in range((len(ids) - 1) // seq_len))
    n = loader.samples_per_epoch
    assert n == expected.total()
    for epoch in range(2):
        rows = loader.rows(range(epoch * n, (epoch + 1) * n))
        assert Counter(map(tuple, rows.tolist())) == expected

        order = [loader.shard_of(sample) for sample in range(epoch * n, (epoch + 1) * n)]
        firsts = [shard.tokens()[0] for shard in shards.train]
        assert order == [int(np.searchsorted(firsts, row[0], side="right")) - 1 for row in rows]
        turns = [(shard - first_shard) % len(lengths) for shard in order]
        assert turns == sorted(turns)


@relaxed
@given(corpus=corpora(), seed=st.integers(0, 2**32), samples=st.lists(st.integers(0, 500), min_size=1, max_size=20))
def test_a_sample_is_a_pure_function_of_seed_and_number(
    tmp_path: Path, corpus: tuple[list[int], int, int], seed: int, samples: list[int]
) -> None:
    lengths, seq_len, first_shard = corpus
    shards = shards_of(tmp_path, lengths)
    together = Loader(shards, seq_len=seq_len, seed=seed, first_shard=first_shard).rows(samples)
    for sample, row in zip(samples, together, strict=True):
        alone = Loader(shards, seq_len=seq_len, seed=seed, first_shard=first_shard).rows([sample])[0]
        assert alone.tolist() == row.tolist()


def test_the_order_is_pinned(tmp_path: Path) -> None:
    """A run must go on in the same order under another version of numpy."""
    loader = Loader(shards_of(tmp_path, [21, 13]), seq_len=2, seed=1234)
    assert loader.samples_per_epoch == 16
    first_epoch = [4, 18, 16, 2, 14, 0, 8, 6, 10, 12, 31, 29, 27, 23, 25, 21]
    second_epoch = [16, 14, 18, 12, 10, 8, 4, 0, 2, 6, 21, 31, 27, 23, 29, 25]
    assert loader.rows(range(32))[:, 0].tolist() == first_epoch + second_epoch


def test_seed_epoch_and_shard_change_the_order(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, [101, 101])
    n = 100
    first = Loader(shards, seq_len=1, seed=1)
    orders = [first.rows(range(start, start + n))[:, 0] for start in (0, n, 2 * n)]
    orders[1] -= 101
    orders.append(Loader(shards, seq_len=1, seed=2).rows(range(n))[:, 0])
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_more_shards_later_leave_the_samples_before_them_where_they_were(tmp_path: Path) -> None:
    few = Loader(shards_of(tmp_path, [50, 40]), seq_len=4, seed=3)
    many = Loader(shards_of(tmp_path, [50, 40, 30]), seq_len=4, seed=3)
    samples = range(few.samples_per_epoch)
    assert few.rows(samples).tolist() == many.rows(samples).tolist()


@relaxed
@given(rows=st.sampled_from([12, 24]), sample=st.integers(0, 100))
def test_a_step_reads_the_same_samples_on_any_number_of_ranks(tmp_path: Path, rows: int, sample: int) -> None:
    loader = Loader(shards_of(tmp_path, [300, 100]), seq_len=5, seed=7)
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
    batch = Loader(shards_of(tmp_path, [40]), seq_len=8, seed=0).batch([0, 1])
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.tokens.is_contiguous()
    assert torch.equal(batch.targets, batch.tokens + 1)


def test_a_corpus_shorter_than_one_sample_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.seq_len: 8 is longer than the corpus \(13 training tokens in 2 shards\); shorten it"):
        Loader(shards_of(tmp_path, [8, 5]), seq_len=8, seed=0)


@relaxed
@given(
    lengths=st.lists(st.integers(1, 30), max_size=4),
    seq_len=st.integers(1, 12),
    batch_size=st.integers(1, 4),
    tokens=st.integers(1, 100),
)
def test_held_out_rows_follow_one_another(tmp_path: Path, lengths: list[int], seq_len: int, batch_size: int, tokens: int) -> None:
    shards = shards_of(tmp_path, [], lengths)
    total = sum(lengths)
    batches = held_out_batches(shards, seq_len=seq_len, batch_size=batch_size, tokens=tokens)
    n_rows = sum(len(batch.tokens) for batch in batches)
    read = [token for batch in batches for token in batch.tokens.flatten().tolist()]
    assert read == list(range(n_rows * seq_len))
    assert all(torch.equal(batch.targets, batch.tokens + 1) for batch in batches)
    assert [len(batch.tokens) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert n_rows == (0 if total <= seq_len else min((total - 1) // seq_len, max(1, tokens // seq_len)))


def steps(n: int) -> Iterator[list[Batch]]:
    for step in range(n):
        yield [Batch.of_rows(np.full((1, 3), step))]


def test_prefetch_hands_over_every_step_in_order() -> None:
    with prefetch(steps(20), pin=False) as batches:
        assert [int(step[0].tokens[0, 0]) for step in batches] == list(range(20))
    assert all(thread.name != "data" for thread in threading.enumerate())


def test_prefetch_reads_ahead_and_no_further() -> None:
    read: list[list[Batch]] = []

    def watched() -> Iterator[list[Batch]]:
        for step in steps(50):
            read.append(step)
            yield step

    with prefetch(watched(), pin=False, ahead=3) as batches:
        next(batches)
        time.sleep(0.3)
        assert 2 < len(read) <= 5  # one handed over, three waiting, one in the thread's hand
    assert len(read) <= 5


def test_what_goes_wrong_while_reading_ahead_is_raised_where_it_is_read() -> None:
    def broken() -> Iterator[list[Batch]]:
        yield from steps(2)
        raise UserError("train-00000.bin", "is missing", "prepare again")

    with prefetch(broken(), pin=False) as batches:
        assert len(list(itertools.islice(batches, 2))) == 2
        with pytest.raises(UserError, match="is missing"):
            next(batches)


def test_leaving_prefetch_stops_its_thread_while_it_waits() -> None:
    with pytest.raises(KeyError), prefetch(steps(10_000), pin=False) as batches:  # noqa: PT012
        next(batches)
        raise KeyError
    assert all(thread.name != "data" for thread in threading.enumerate())


@pytest.mark.gpu
def test_pinned_batches_are_page_locked_and_equal() -> None:
    with prefetch(steps(3), pin=True) as batches:
        for number, (batch,) in enumerate(batches):
            assert batch.tokens.is_pinned()
            assert batch.targets.is_pinned()
            assert batch.tokens.tolist() == [[number, number]]
