"""The order of samples in one folder of shards, which may still be growing."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minifoundation.data.shards import MANIFEST, Shards
from minifoundation.errors import UserError
from minifoundation.wording import counted


def samples_in(tokens: int, seq_len: int) -> int:
    """Return how many samples a shard of ``tokens`` tokens holds: neighbours share one token, the last ones may be too few."""
    return max(0, tokens - 1) // seq_len


def samples_from(shards: Shards, first_shard: int, seq_len: int) -> int:
    """Return how many samples the shards hold from ``first_shard`` on."""
    return sum(samples_in(shard.n_tokens, seq_len) for shard in shards.train[first_shard:])


@dataclass(frozen=True)
class Order:
    """The order of a folder's shards as far as it is known: from the first shard on, and wrapping once the corpus is complete.

    Raises:
        UserError: the corpus is complete, and no shard is as long as one sample.
    """

    shards: Shards
    seq_len: int
    first_shard: int

    def __post_init__(self) -> None:
        if self.shards.complete and self.known == 0:
            raise UserError(
                "train.seq_len",
                f"{self.seq_len} is longer than the corpus ({self.shards.train_tokens:,} training tokens in "
                f"{counted(len(self.shards.train), 'shard')} of {self.shards.folder})",
                "shorten it, give more text, or raise data.shard_tokens",
            )

    @cached_property
    def turns(self) -> list[int]:
        """The shards (their indices in ``shards.train``) in the order in which they are read."""
        numbers = list(range(len(self.shards.train)))
        return numbers[self.first_shard :] + (numbers[: self.first_shard] if self.shards.complete else [])

    @cached_property
    def ends(self) -> npt.NDArray[np.int64]:
        """The number of samples up to the end of each turn."""
        lengths = [samples_in(self.shards.train[shard].n_tokens, self.seq_len) for shard in self.turns]
        return np.cumsum(np.array(lengths, dtype=np.int64))

    @property
    def known(self) -> int:
        """Samples whose place is known: an epoch when the corpus is complete."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def touched(self, samples: int) -> int:
        """Return how many turns the first ``samples`` samples reach into."""
        if samples >= self.known:
            return len(self.turns)
        return int(np.searchsorted(self.ends, samples - 1, side="right")) + 1 if samples else 0

    def sha256(self, turns: int) -> str:
        """Return one hash over the recorded hashes of the shards of the first ``turns`` turns."""
        records = [pair.train for pair in self.shards.manifest.pairs if pair.train]
        return hashlib.sha256("\n".join(records[shard].sha256 for shard in self.turns[:turns]).encode()).hexdigest()


class Samples:
    """Samples of ``seq_len`` + 1 tokens by number, each once an epoch.

    Sample g lies in epoch g // samples_per_epoch. An epoch reads the shards in order from ``first_shard`` on, wrapping, and
    the samples of a shard in a permutation drawn from (seed, epoch, shard). Neighbours share one token: the last target of
    one is the first token of the next.

    While the folder grows only the first epoch has begun, so the shards there are suffice to tell which samples are in reach, and
    those have the places that they have when all shards are there. Threads may share one object.

    Raises:
        UserError: the corpus is complete, and no shard is as long as one sample.
    """

    def __init__(self, shards: Shards, *, seq_len: int, seed: int, first_shard: int = 0) -> None:
        self.seq_len = seq_len
        self.seed = seed
        self.first_shard = first_shard
        self._order = Order(shards, seq_len, first_shard)
        self._seen: tuple[int, int, int] | None = None  # not asked now: the folder may have grown since it was opened
        self._lock = threading.Lock()
        self._rows = lru_cache(maxsize=8)(self._rows_of)
        self._permutation = lru_cache(maxsize=2)(self._permutation_of)

    @property
    def order(self) -> Order:
        """The order as far as it is known by now; the manifest is read again when it has changed."""
        with self._lock:
            if not self._order.shards.complete and (seen := _version(self._order.shards.folder)) != self._seen:
                self._order = Order(Shards.open(self._order.shards.folder), self.seq_len, self.first_shard)
                self._seen = seen
            return self._order

    @property
    def samples_per_epoch(self) -> int | None:
        """None while the folder grows."""
        order = self.order
        return order.known if order.shards.complete else None

    def has(self, samples: int) -> bool:
        """Return whether the first ``samples`` samples can be read by now."""
        order = self._order
        if samples > order.known:
            order = self.order
        return order.shards.complete or samples <= order.known

    def rows(self, numbers: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the tokens of the samples ``numbers``, which must be in reach (``has``), shape (len(numbers), seq_len + 1)."""
        assert self.has(int(np.max(numbers)) + 1)
        order = self._order
        rows = np.empty((len(numbers), self.seq_len + 1), dtype=np.int64)
        epochs, within = np.divmod(np.asarray(numbers, dtype=np.int64), order.known)
        turns = np.searchsorted(order.ends, within, side="right")
        places = within - np.where(turns > 0, order.ends[turns - 1], 0)
        for epoch, turn in set(zip(epochs.tolist(), turns.tolist(), strict=True)):
            here = (epochs == epoch) & (turns == turn)
            shard = order.turns[turn]
            rows[here] = self._rows(shard)[self._permutation(epoch, shard)[places[here]]]
        return rows

    def _rows_of(self, shard: int) -> npt.NDArray[Any]:
        """Return the samples of a shard in their order on disk, as a view of the file."""
        return np.lib.stride_tricks.sliding_window_view(self._order.shards.train[shard].tokens(), self.seq_len + 1)[:: self.seq_len]

    def _permutation_of(self, epoch: int, shard: int) -> npt.NDArray[Any]:
        return permutation(samples_in(self._order.shards.train[shard].n_tokens, self.seq_len), self.seed, epoch, shard)

    def touched(self, samples: int) -> int:
        """Return how many shards, in the order of reading, the first ``samples`` samples reach into."""
        return self.order.touched(samples)

    def epochs(self, samples: int) -> float | None:
        """Return how often all have been read after ``samples``; None while the folder grows."""
        there = self.samples_per_epoch
        return None if there is None else samples / there


def permutation(count: int, *seeds: int) -> npt.NDArray[Any]:
    """Return an order of ``count`` things, (count,), that depends on ``seeds`` alone."""
    # RandomState's streams are frozen (NEP 19); those of numpy's newer generators may change with a release, and with them the order.
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(seeds))).permutation(count)


def _version(folder: Path) -> tuple[int, int, int]:
    """Return what changes when the folder's manifest is replaced."""
    status = (folder / MANIFEST).stat()
    return status.st_ino, status.st_mtime_ns, status.st_size
