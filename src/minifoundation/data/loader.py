"""Sample number to tokens: the place in the data is one integer, and the order a pure function of it and the seed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from minifoundation.data.batch import Batch
from minifoundation.data.mixture import Mixture
from minifoundation.data.samples import Order

POLL_SECONDS = 0.3
"""Between two looks at a folder that is still growing."""


class Readable(Protocol):
    """Samples of one source, or of a part of it, by number: ``Samples``, or the two kinds of rows of ``data/lengths.py``."""

    first_shard: int
    seq_len: int

    @property
    def order(self) -> Order: ...

    @property
    def samples_per_epoch(self) -> int | None: ...

    def has(self, samples: int) -> bool: ...

    def rows(self, numbers: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]: ...

    def touched(self, samples: int) -> int: ...

    def epochs(self, samples: int) -> float | None: ...


PARTS = ("long", "short")


def part_of(source: str, part: str) -> str:
    """Return the name under which a loader has the long or the short documents of ``source``."""
    return f"{source} ({part} documents)"


def source_of(name: str) -> tuple[str, str | None]:
    """Return the source and the part of it that ``name`` stands for."""
    for part in PARTS:
        if name.endswith(suffix := part_of("", part)):
            return name.removesuffix(suffix), part
    return name, None


class Loader:
    """Samples of one source, or of several by weight, by one number.

    ``Mixture`` says which source a number belongs to and which sample of that source it is; ``Samples`` has the order within a
    source. A sample that is still being made is waited for.

    Args:
        sources: the samples of each source, by its name.
        weights: the share of each source.
        mask_documents: give each batch the ends of its documents.
    """

    def __init__(self, sources: Mapping[str, Readable], weights: Mapping[str, float], *, mask_documents: bool = False) -> None:
        self.sources = dict(sorted(sources.items()))  # the order of the names in a file does not change the samples
        self.mixture = Mixture([weights[name] for name in self.sources])
        self.mask_documents = mask_documents
        self._samples = list(self.sources.values())
        self.eos = self._samples[0].order.shards.manifest.eos
        self._stopped = threading.Event()

    def counts(self, samples: int) -> dict[str, int]:
        """Return how many of the first ``samples`` samples each source has."""
        return dict(zip(self.sources, self.mixture.counts(samples), strict=True))

    def has(self, samples: int) -> bool:
        """Return whether the first ``samples`` samples can be read by now."""
        return all(one.has(count) for one, count in zip(self._samples, self.mixture.counts(samples), strict=True))

    def reach(self, limit: int) -> int:
        """Return how many samples from the first on can be read by now; ``limit`` where it is as many or more."""
        if self.has(limit):
            return limit
        low, high = 0, limit  # has(low), not has(high)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.has(middle) else (low, middle)
        return low

    def rows(self, samples: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the tokens of ``samples``, shape (len(samples), seq_len + 1); waits until they are there, or for ``stop``."""
        last = int(max(samples))
        while not self.has(last + 1):
            if self._stopped.wait(POLL_SECONDS):
                raise RuntimeError("stopped while waiting for shards")
        places = np.array([self.mixture.place(int(sample)) for sample in samples], dtype=np.int64)
        rows = np.empty((len(samples), self._samples[0].seq_len + 1), dtype=np.int64)
        for number in np.unique(places[:, 0]):
            here = places[:, 0] == number
            rows[here] = self._samples[number].rows(places[here, 1])
        return rows

    def batch(self, samples: Sequence[int] | npt.NDArray[np.int64]) -> Batch:
        """Return the micro-batch of ``samples``; waits as ``rows`` does."""
        return Batch.of_rows(self.rows(samples), mask_documents=self.mask_documents, eos=self.eos)

    def stop(self) -> None:
        """Have every wait end, in whatever thread it is."""
        self._stopped.set()


def micro_batches(loader: Loader, sample: int, *, batch_size: int, grad_accum: int, rank: int, world_size: int) -> Iterator[Batch]:
    """Return this rank's micro-batches of the step that begins at ``sample``.

    A step reads samples ``sample`` to ``sample + batch_size * grad_accum * world_size - 1``, whatever the number of ranks that
    share them.
    """
    for micro in range(grad_accum):
        first = sample + (micro * world_size + rank) * batch_size
        yield loader.batch(range(first, first + batch_size))
