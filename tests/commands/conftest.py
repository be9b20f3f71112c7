"""A checkpoint of a tiny, barely trained model with a real tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "shakespeare.txt"


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A SentencePiece model of 512 pieces."""
    from minifoundation.config import TokenizerConfig
    from minifoundation.data.tokenizer import train_tokenizer

    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(
        EXAMPLE.read_text(encoding="utf-8")[:60_000].split("\n\n"),
        TokenizerConfig(
            vocab_size=512,
        ),
        path,
    )
    return path.read_bytes()


@pytest.fixture
def final(tmp_path: Path, tokenizer_model: bytes) -> Callable[..., Path]:
    """A function from changed model settings to the ``final.pth`` of an initialised model."""
    from minifoundation.checkpoint import Checkpoint, save_final
    from minifoundation.config import DataConfig, ModelConfig, RunConfig, TrainConfig
    from minifoundation.model.transformer import Transformer

    def make(*, with_ema: bool = False, **changes: Any) -> Path:
        settings = {"vocab_size": 640, "d_model": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 96, "original_seq_len": 64}
        config = ModelConfig.model_validate(settings | changes)
        run = RunConfig(model=config, data=DataConfig(source="examples"), train=TrainConfig(tokens=1000, seq_len=32))
        transformer, average = Transformer(config), Transformer(config)
        transformer.initialise(0)
        average.initialise(1)
        ema = average.state_dict() if with_ema else None
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        return save_final(
            Checkpoint(config=run, model=transformer.state_dict(), tokenizer_model=tokenizer_model, progress={"step": 1}, ema=ema), folder
        )

    return make
