"""What is in a folder of token shards: counts, lengths, and whether the files are still what was written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from minifoundation.data.shards import MANIFEST, REMEDY, Shard, Shards, intact
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.errors import UserError


def folders(path: Path) -> list[Path]:
    """Return ``path`` when it is a folder of shards, or else the folders of shards in it; none is ``path`` too."""
    within = [] if (path / MANIFEST).exists() else sorted(manifest.parent for manifest in path.glob(f"*/{MANIFEST}"))
    return within or [path]


@dataclass(frozen=True)
class Split:
    """The shards of one split, counted."""

    tokens: int
    text_bytes: int
    lengths: npt.NDArray[np.int64]
    """Tokens of each document, bos and eos included."""


def split(shards: tuple[Shard, ...], eos: int) -> Split:
    """Return the counts of a split; reads every token once."""
    lengths = [np.diff(starts_of(shard, eos), append=shard.n_tokens) for shard in shards] or [np.zeros(0, np.int64)]
    return Split(sum(shard.n_tokens for shard in shards), sum(shard.text_bytes for shard in shards), np.concatenate(lengths))


def starts_of(shard: Shard, eos: int) -> npt.NDArray[np.int64]:
    """Return where each document of a shard begins; reads every token."""
    ends = np.flatnonzero(shard.tokens() == eos)  # no text encodes to eos, so it stands at the end of documents alone
    return np.append(0, ends[:-1] + 1)


def check(shards: Shards) -> None:
    """Read every file again.

    Raises:
        UserError: one is not what was written; it is named.
    """
    for pair in shards.manifest.pairs:
        for record in pair.records:
            if not intact(shards.folder, record):
                raise UserError(str(shards.folder / record.file), "is not what was written (sha256)", REMEDY)


def check_tokenizer(shards: Shards, tokenizer: Tokenizer) -> None:
    """Raise UserError when the shards were made with another tokenizer: their ids would be read as other text."""
    if tokenizer.sha256 != shards.manifest.tokenizer_sha256:
        raise UserError("--tokenizer", f"{tokenizer.path} is not the one {shards.folder} was made with", "give that one")


def samples(shards: Shards, tokenizer: Tokenizer, count: int) -> Iterator[tuple[str, str]]:
    """Yield (place, text) of ``count`` documents spread over the training shards, bos and eos spelled out; none twice.

    Raises:
        UserError: the shards were made with another tokenizer.
    """
    check_tokenizer(shards, tokenizer)
    names, number = tokenizer.special_tokens, 0
    for place, shard in enumerate(shards.train, start=1):
        first, number = number, -(-place * count // len(shards.train))
        if first == number:
            continue
        tokens = shard.tokens()
        starts = np.append(starts_of(shard, shards.manifest.eos), shard.n_tokens)
        documents = len(starts) - 1
        for which in (one % documents for one in range(first, min(number, first + documents))):
            ids = tokens[starts[which] : starts[which + 1]].tolist()
            text = (names["bos_token"] if tokenizer.prefix else "") + tokenizer.decode(ids) + names["eos_token"]
            yield f"{shard.path.name}, document {which}, {len(ids):,} tokens", text


def texts(shards: Sequence[Shard], tokenizer: Tokenizer, most_bytes: int) -> list[str]:
    """Return the first documents of ``shards`` as text, until they have ``most_bytes``."""
    found: list[str] = []
    size = 0
    for shard in shards:
        tokens = shard.tokens()
        for start, end in pairwise(np.append(starts_of(shard, tokenizer.special.eos), shard.n_tokens)):
            if size >= most_bytes:
                return found
            found.append(tokenizer.decode(tokens[start:end].tolist()))
            size += len(found[-1].encode())
    return found
