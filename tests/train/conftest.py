"""A corpus, settings and runs small enough for two cores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minifoundation import config
from minifoundation.config import RunConfig
from tests.cheaper import cheaper_runs

__all__ = ["cheaper_runs"]
EXAMPLE = Path(__file__).parents[2] / "examples" / "shakespeare.txt"

TINY: dict[str, Any] = {
    "model": {"vocab_size": 512, "d_model": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 64, "original_seq_len": 32},
    "tokenizer": {"vocab_size": 512},
    "data": {"held_out": 0.3, "max_document_bytes": 512, "shard_tokens": 4096},
    "train": {
        "tokens": 32 * 4 * 12,
        "seq_len": 32,
        "batch_size": 2,
        "grad_accum": 2,
        "lr": 1e-2,
        "eval_every": 5,
        "eval_tokens": 512,
        "save_every": 4,
        "keep": 10,
    },
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 60 kB of verse."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "verse.txt").write_bytes(EXAMPLE.read_bytes()[:60_000])
    return folder


@pytest.fixture
def settings(corpus: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A function from changed sections to a RunConfig that trains in ``tmp_path`` in a second or two."""

    def make(out_dir: str = "run", **sections: dict[str, Any]) -> RunConfig:
        here = {"out_dir": str(tmp_path / out_dir), "data": {"source": str(corpus), "shards_dir": str(tmp_path / "shards")}}
        return config.build(RunConfig, config.merged(config.merged(TINY, here), sections), "test")

    return make
