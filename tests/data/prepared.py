"""What several tests of prepare need: a run of it, and its results in a form to compare."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minifoundation.config import DataConfig
from minifoundation.data.engines import Engine, in_process
from minifoundation.data.prepare import prepare_shards
from minifoundation.data.rows import all_documents
from minifoundation.data.shards import Shard, Shards
from minifoundation.data.tokenizer import BOS, EOS, Tokenizer


def prepared(data: DataConfig, tokenizer: Tokenizer, tokens: int | None = None, engine: Engine | None = None, **options: Any) -> Shards:
    """Return the shards of the one source of ``data``."""
    assert data.source is not None
    return prepare_shards(data.source, data, tokenizer, tokens=tokens, engine=engine or in_process(), show_progress=False, **options)


def files(folder: Path) -> dict[str, bytes]:
    """Return what is in the folder, apart from the lock and the work."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def all_texts(data: DataConfig) -> list[str]:
    """Return the documents of the one source of ``data``."""
    assert data.source is not None
    return list(all_documents(data.source, data))


def texts_in(tokenizer: Tokenizer, shards: tuple[Shard, ...]) -> Iterator[str]:
    """Read documents back from their bos to their eos."""
    for shard in shards:
        ids = shard.tokens()
        assert ids[0] == BOS
        assert ids[-1] == EOS
        ends = np.flatnonzero(ids == EOS)
        for start, end in zip([0, *(ends[:-1] + 1)], ends, strict=True):
            assert ids[start] == BOS
            yield tokenizer.decode(ids[start + 1 : end].tolist())
