"""Sample number to tokens: the place in the data is one integer, and the order a pure function of it and the seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from minifoundation.data.batch import Batch
from minifoundation.data.shards import Shards
from minifoundation.errors import UserError


class Loader:
    """Samples of ``seq_len`` + 1 tokens by number, each once an epoch.

    Sample g lies in epoch g // samples_per_epoch. An epoch reads the shards in order from ``first_shard`` on, wrapping, and
    the samples of a shard in a permutation drawn from (seed, epoch, shard). Neighbours share one token: the last target of
    one is the first token of the next.

    Raises:
        UserError: no shard is as long as one sample.
    """

    def __init__(self, shards: Shards, *, seq_len: int, seed: int, first_shard: int = 0) -> None:
        self.seq_len = seq_len
        self.seed = seed
        self._shards = shards.train
        samples = np.array([max(0, shard.n_tokens - 1) // seq_len for shard in shards.train], dtype=np.int64)
        self._order = np.roll(np.arange(len(samples)), -first_shard)
        self._ends = np.cumsum(samples[self._order])
        self.samples_per_epoch = int(self._ends[-1]) if len(samples) else 0
        if self.samples_per_epoch == 0:
            raise UserError(
                "train.seq_len",
                f"{seq_len} is longer than the corpus ({shards.train_tokens:,} training tokens in {len(samples)} shards)",
                "shorten it, give more text, or raise data.shard_tokens",
            )
        self._rows = lru_cache(maxsize=8)(self._rows_of)
        self._permutation = lru_cache(maxsize=2)(lambda epoch, shard: _permutation(int(samples[shard]), (seed, epoch, shard)))

    def rows(self, samples: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the tokens of ``samples``, shape (len(samples), seq_len + 1)."""
        rows = np.empty((len(samples), self.seq_len + 1), dtype=np.int64)
        epochs, turns, places = self._places(samples)
        for epoch, turn in set(zip(epochs.tolist(), turns.tolist(), strict=True)):
            here = (epochs == epoch) & (turns == turn)
            shard = int(self._order[turn])
            rows[here] = self._rows(shard)[self._permutation(epoch, shard)[places[here]]]
        return rows

    def batch(self, samples: Sequence[int] | npt.NDArray[np.int64]) -> Batch:
        """Return the micro-batch of ``samples``."""
        return Batch.of_rows(self.rows(samples))

    def shard_of(self, sample: int) -> int:
        """Return which shard (its index in ``shards.train``) a sample lies in."""
        return int(self._order[self._places([sample])[1][0]])

    def _places(self, samples: Sequence[int] | npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], ...]:
        """Return for each sample the epoch, the turn of its shard in the order, and its number within the shard."""
        epochs, numbers = np.divmod(np.asarray(samples, dtype=np.int64), self.samples_per_epoch)
        turns = np.searchsorted(self._ends, numbers, side="right")
        return epochs, turns, numbers - np.where(turns > 0, self._ends[turns - 1], 0)

    def _rows_of(self, shard: int) -> npt.NDArray[Any]:
        """Return the samples of a shard in their order on disk, as a view of the file."""
        return np.lib.stride_tricks.sliding_window_view(self._shards[shard].tokens(), self.seq_len + 1)[:: self.seq_len]


def _permutation(n: int, seed: tuple[int, int, int]) -> npt.NDArray[Any]:
    # RandomState's streams are frozen (NEP 19); those of numpy's newer generators may change with a release, and with them the order.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seed))).permutation(n)


def held_out_batches(shards: Shards, *, seq_len: int, batch_size: int, tokens: int) -> list[Batch]:
    """Return the beginning of the held-out split as rows in a fixed order, ``tokens`` tokens at most (but one row at least).

    The list is empty when the split is shorter than one row.
    """
    n_rows = min(max(tokens // seq_len, 1), (shards.held_out_tokens - 1) // seq_len)
    stream: list[npt.NDArray[Any]] = []
    missing = n_rows * seq_len + 1
    for shard in shards.held_out:
        stream.append(shard.tokens()[:missing])
        missing -= len(stream[-1])
        if missing == 0:
            break
    if n_rows < 1:
        return []
    ids = np.concatenate(stream).astype(np.int64)
    rows = np.lib.stride_tricks.sliding_window_view(ids, seq_len + 1)[::seq_len]
    return [Batch.of_rows(rows[first : first + batch_size].copy()) for first in range(0, n_rows, batch_size)]


def micro_batches(loader: Loader, sample: int, *, batch_size: int, grad_accum: int, rank: int, world_size: int) -> Iterator[Batch]:
    """Return this rank's micro-batches of the step that begins at ``sample``.

    A step reads samples ``sample`` to ``sample + batch_size * grad_accum * world_size - 1``, whatever the number of ranks that
    share them.
    """
    for micro in range(grad_accum):
        first = sample + (micro * world_size + rank) * batch_size
        yield loader.batch(range(first, first + batch_size))
