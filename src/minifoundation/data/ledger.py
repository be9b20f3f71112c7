"""What a run has read of each source, kept in its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from minifoundation.data.loader import Readable, source_of
from minifoundation.data.mixture import Mixture


@dataclass(frozen=True)
class Entry:
    """What one phase of training has read of one source."""

    phase: str
    source: str
    share: float
    """Of the phase's samples."""
    folder: str
    corpus: dict[str, Any]
    """The identity of the corpus as its manifest has it: files by hash, or data set and revision."""
    tokenizer_sha256: str
    first_shard: int
    shards: int
    """How many were touched, from ``first_shard`` on and wrapping at the end of the corpus."""
    shards_sha256: str
    """One hash over the recorded hashes of these shards, in the order of reading."""
    samples: int
    """The samples of this source that were read: the numbers from 0 on."""
    seq_len: int
    epochs: float | None
    """Times the whole corpus was read; None where its end was not known yet, which is less than once."""
    part: str | None = None
    """long or short, where documents were told apart by their length: the epochs are then over those of this part, in these shards."""

    @property
    def tokens(self) -> int:
        return self.samples * self.seq_len

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def entries(sources: Mapping[str, Readable], mixture: Mixture, samples: int, phase: str) -> list[Entry]:
    """Return the entry of each source after the first ``samples`` samples of a phase."""
    found = []
    for (name, source), count, share in zip(sources.items(), mixture.counts(samples), mixture.shares, strict=True):
        order = source.order
        touched = source.touched(count)
        of, part = source_of(name)
        found.append(
            Entry(
                phase=phase,
                source=of,
                share=float(share),
                folder=str(order.shards.folder),
                corpus=order.shards.manifest.source,
                tokenizer_sha256=order.shards.manifest.tokenizer_sha256,
                first_shard=source.first_shard,
                shards=touched,
                shards_sha256=order.sha256(touched),
                samples=count,
                seq_len=source.seq_len,
                epochs=source.epochs(count),
                part=part,
            )
        )
    return found
