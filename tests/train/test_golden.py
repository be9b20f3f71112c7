"""The golden curve: 50 steps of a tiny model. A change that claims to leave results alone leaves ``tests/golden/tiny.json`` alone.

A change that means to alter them writes it anew, and says so:  python -m tests.train.test_golden
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minifoundation.config import ModelConfig, TrainConfig
from minifoundation.data.batch import Batch
from minifoundation.distributed import World
from minifoundation.model.training import TrainingModel
from minifoundation.model.transformer import Transformer
from minifoundation.train.optimizer import adamw
from minifoundation.train.schedule import learning_rate
from minifoundation.train.step import train_step

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny.json"
STEPS = 50


def curve() -> list[list[float]]:
    """Return [cross entropy, z-loss, gradient norm] of each step."""
    rope = {"scaling": "yarn", "factor": 2.0}
    sizes = {"vocab_size": 256, "d_model": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 64, "original_seq_len": 32}
    transformer = Transformer(ModelConfig.model_validate({**sizes, "rope": rope, "qk_norm": True}))
    transformer.initialise(11)
    model = TrainingModel(transformer, z_loss=1e-3, chunk=100)
    train = TrainConfig(tokens=1, lr=5e-3)
    optimizer = adamw(dict(transformer.named_parameters()), train)
    random = torch.Generator().manual_seed(5)
    rows = torch.randint(256, (STEPS, 4, 65), generator=random).sort(-1).values
    found = []
    for step in range(STEPS):
        stats = train_step(
            model,
            optimizer,
            torch.amp.GradScaler("cpu", enabled=False),
            [Batch(part[:, :-1], part[:, 1:]) for part in rows[step].chunk(2)],
            lr=learning_rate(step, STEPS, train),
            grad_clip=train.grad_clip,
            tokens=4 * 64,
            world=World(),
        )
        found.append([float(f"{value:.7g}") for value in stats.read()[:3]])
    return found


def test_the_curve_is_the_one_that_is_kept() -> None:
    kept = json.loads(GOLDEN.read_text(encoding="utf-8"))
    for step, (found, expected) in enumerate(zip(curve(), kept, strict=True), start=1):
        assert found == pytest.approx(expected, rel=1e-4), f"step {step}"


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(curve()).replace("], [", "],\n [") + "\n", encoding="utf-8")
