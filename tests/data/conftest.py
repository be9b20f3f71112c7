"""A small corpus of many pieces, and a tokenizer for it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from minifoundation.config import DataConfig, TokenizerConfig
from minifoundation.data import pieces, prepare
from minifoundation.data.prepare import tokenizer_for
from minifoundation.data.tokenizer import Tokenizer

WORDS = ["the", "of", "and", "in", "that", "was", "his", "with", "for", "had", "you", "not", "her", "which", "have", "from", "but", "all"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 documents, some of them twice, and three rows that are none."""
    rng = random.Random(7)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 200))) + f".\n\n\t{n}  ü ende\r\n" for n in range(480)]
    rows: list[Any] = [*texts, *texts[:20]]
    rows[100:100], rows[300:300], rows[500:500] = [None], [""], [None]
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    return folder


@pytest.fixture(scope="session")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_for(TokenizerConfig(vocab_size=512), DataConfig(source=str(corpus)), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def data(corpus: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(source=str(corpus), shards_dir=tmp_path / "shards", shard_tokens=4096, held_out=0.1)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut small corpora as large ones are: about ten pieces of three blocks."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 6_000)
