"""The held-out rows that a run is evaluated on: a choice that does not depend on when it is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from minifoundation.data.batch import Batch
from minifoundation.data.loader import Loader, Readable
from minifoundation.data.samples import samples_in
from minifoundation.data.shards import Shard


class HeldOut:
    """The beginning of the held-out split of each source, by weight, as rows in a fixed order.

    The split grows with the shards. So that the rows are the same whenever they are asked for, and whatever else is made in the
    folder, they are taken from the pairs up to the one that completes what the run trains on, and they are not known before
    these hold enough rows, or are all there.

    Args:
        loader: of the samples that the run trains on.
        samples: how many of them it reads.
        tokens: held-out tokens over all sources, at most; one row at least.
        text_bytes: the bytes of text that ids stand for.
        share: of the documents that was to be held out.
    """

    def __init__(
        self,
        loader: Loader,
        *,
        samples: int,
        tokens: int,
        batch_size: int,
        text_bytes: Callable[[npt.NDArray[np.int64]], int],
        share: float,
    ) -> None:
        self._loader = loader
        self._batch_size = batch_size
        self._text_bytes = text_bytes
        self._share = share
        self._wanted = loader.counts(samples)
        first = next(iter(loader.sources.values()))
        self._n_rows = loader.counts(max(tokens // first.seq_len, 1))

    def ready(self) -> bool:
        """Return whether the rows are known by now."""
        return self._parts is not None

    @cached_property
    def batches(self) -> list[Batch]:
        """The rows in micro-batches; empty where too little is held out. Asked for when ``ready``."""
        rows = self._rows
        parts = [rows[first : first + self._batch_size] for first in range(0, len(rows), self._batch_size)]
        return [Batch.of_rows(part, mask_documents=self._loader.mask_documents, eos=self._loader.eos) for part in parts]

    def lacking(self) -> list[str]:
        """Return a line for each source of which rows are wanted and too little is held out for one, as far as that is known by now.

        No line where nothing was to be held out.
        """
        lines = []
        for name, shards in self._by_source.items() if self._share else ():
            least = self._loader.sources[name].seq_len
            if shards is not None and self._n_rows[name] and sum(shard.n_tokens for shard in shards) <= least:
                of_which = "" if len(self._n_rows) == 1 else f"of {name} "
                few = f"too few documents of the shards {of_which}that are read fell into it to evaluate on"
                lines.append(f"warning: data.held_out: {few}; raise data.held_out or lower data.max_document_bytes")
        return lines

    @cached_property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text to a token, over the targets of the rows alone."""
        targets = self._rows[:, 1:]
        return self._text_bytes(targets) / targets.size

    @cached_property
    def _rows(self) -> npt.NDArray[np.int64]:
        assert self._parts is not None
        return np.concatenate(
            [
                rows_of(shards, n_rows, samples.seq_len)
                for shards, n_rows, samples in zip(self._parts, self._n_rows.values(), self._loader.sources.values(), strict=True)
            ]
        )

    @property
    def _parts(self) -> list[Sequence[Shard]] | None:
        found = self._by_source.values()
        return None if None in found else [part for part in found if part is not None]

    @property
    def _by_source(self) -> dict[str, Sequence[Shard] | None]:
        return {name: _settled(samples, self._wanted[name], self._n_rows[name]) for name, samples in self._loader.sources.items()}


def _settled(samples: Readable, wanted: int, n_rows: int) -> Sequence[Shard] | None:
    """Return the held-out shards of one source to take ``n_rows`` rows from, None while this depends on shards still to come."""
    order = samples.order
    trained = held = tokens = numbers = 0
    for pair in order.shards.manifest.pairs:
        if pair.held_out:
            held += 1
            tokens += pair.held_out.tokens
        if pair.train:
            trained += samples_in(pair.train.tokens, samples.seq_len) if numbers >= samples.first_shard else 0
            numbers += 1
        if samples_in(tokens, samples.seq_len) >= n_rows or trained >= wanted:
            return order.shards.held_out[:held]
    return order.shards.held_out if order.shards.complete else None


def rows_of(shards: Sequence[Shard], n_rows: int, seq_len: int) -> npt.NDArray[np.int64]:
    """Return the first ``n_rows`` rows, or as many as there are, of the shards one after the other, shape (rows, seq_len + 1)."""
    stream: list[npt.NDArray[Any]] = [np.empty(0, np.int64)]
    missing = n_rows * seq_len + 1
    for shard in shards:
        stream.append(shard.tokens()[:missing])
        missing -= len(stream[-1])
    ids = np.concatenate(stream).astype(np.int64)
    if len(ids) <= seq_len:
        return np.empty((0, seq_len + 1), np.int64)
    return np.lib.stride_tricks.sliding_window_view(ids, seq_len + 1)[::seq_len].copy()
