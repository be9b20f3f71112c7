"""Training against somebody else's arithmetic: Hugging Face's model and a training loop written out plainly.

The same weights, data and order; every part also alone, so that a fault names itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from minifoundation.config import ModelConfig, TrainConfig
from minifoundation.data.batch import Batch
from minifoundation.distributed import World
from minifoundation.export.weights import hf_config, to_hf
from minifoundation.model.training import TrainingModel
from minifoundation.model.transformer import Transformer
from minifoundation.train.optimizer import adamw
from minifoundation.train.schedule import learning_rate
from minifoundation.train.step import train_step

LOSS_TOLERANCE = 1e-4
WEIGHT_TOLERANCE = 1e-3
VOCABULARY, LENGTH, ROWS = 256, 32, 4


@dataclass(frozen=True)
class Case:
    """Which parts are on."""

    qk_norm: bool = False
    head_dim: int | None = None
    z_loss: float = 0.0
    grad_clip: float | None = None
    grad_accum: int = 1
    weight_decay: float = 0.0
    schedule: str = "constant"
    steps: int = 40


CASES = {
    "plain": Case(),
    "z_loss": Case(z_loss=1e-2),
    "clip": Case(grad_clip=0.3),
    "accumulation": Case(grad_accum=4),
    "decay": Case(weight_decay=0.3),
    "cosine": Case(schedule="cosine"),
    "heads": Case(qk_norm=True, head_dim=16),
    "llama": Case(z_loss=1e-4, grad_clip=1.0, grad_accum=2, weight_decay=0.1, schedule="cosine", steps=200),
    "qwen3": Case(qk_norm=True, z_loss=1e-4, grad_clip=1.0, grad_accum=2, weight_decay=0.1, schedule="cosine", steps=200),
}


def chain(steps: int, rows: int) -> Tensor:
    """Return (steps, rows, LENGTH + 1) tokens of a noisy Markov chain, so that there is something to learn.

    Token 0 is padding and occurs in no document: Hugging Face's embedding gives its row no gradient.
    """
    random = torch.Generator().manual_seed(7)
    follow = torch.randint(1, VOCABULARY, (VOCABULARY,), generator=random)
    tokens = torch.randint(1, VOCABULARY, (steps, rows, LENGTH + 1), generator=random)
    noise = torch.rand((steps, rows, LENGTH + 1), generator=random)
    for place in range(1, LENGTH + 1):
        tokens[:, :, place] = torch.where(noise[:, :, place] < 0.8, follow[tokens[:, :, place - 1]], tokens[:, :, place])
    return tokens


def model_config(case: Case) -> ModelConfig:
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 64, "original_seq_len": 64}
    return ModelConfig.model_validate(sizes | {"qk_norm": case.qk_norm, "head_dim": case.head_dim})


def ours(case: Case) -> tuple[list[float], dict[str, Tensor]]:
    """Train our model by ``train_step``; the weights come back by Hugging Face's names."""
    config = model_config(case)
    train = TrainConfig.model_validate(
        {"tokens": 1, "lr": 3e-3, "warmup": 0.05, "schedule": case.schedule, "weight_decay": case.weight_decay, "grad_clip": case.grad_clip}
    )
    transformer = Transformer(config)
    transformer.initialise(3)
    model = TrainingModel(transformer, z_loss=case.z_loss, chunk=50)
    optimizer = adamw(dict(transformer.named_parameters()), train)
    losses = []
    for step, rows in enumerate(chain(case.steps, ROWS)):
        batches = [Batch(part[:, :-1], part[:, 1:]) for part in rows.chunk(case.grad_accum)]
        stats = train_step(
            model,
            optimizer,
            torch.amp.GradScaler("cpu", enabled=False),
            batches,
            lr=learning_rate(step, case.steps, train),
            grad_clip=case.grad_clip,
            tokens=rows.shape[0] * LENGTH,
            world=World(),
        )
        losses.append(stats.read()[0])
    return losses, to_hf(config, transformer.state_dict())


@cache
def plain(case: Case) -> tuple[list[float], dict[str, Tensor]]:
    """Train Hugging Face's model on the undivided rows, everything written out."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = model_config(case)
    transformer = Transformer(config)
    transformer.initialise(3)
    settings: dict[str, Any] = hf_config(config)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), attn_implementation="eager").float()
    model.load_state_dict(to_hf(config, transformer.state_dict()), strict=False)
    model.tie_weights()
    decayed = [p for n, p in model.named_parameters() if n.endswith("proj.weight")]
    others = [p for n, p in model.named_parameters() if not n.endswith("proj.weight")]
    groups = [{"params": decayed, "weight_decay": case.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    peak, losses = 3e-3, []
    for step, rows in enumerate(chain(case.steps, ROWS)):
        logits = model(rows[:, :-1]).logits.float()
        log_z = logits.logsumexp(-1)
        cross_entropy = (log_z - logits.gather(-1, rows[:, 1:, None])[..., 0]).mean()
        (cross_entropy + case.z_loss * log_z.square().mean()).backward()
        if case.grad_clip is not None:
            norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
            for p in model.parameters():
                p.grad *= min(1.0, case.grad_clip / norm)
        warm = math.ceil(0.05 * case.steps)
        if step < warm:
            rate = peak * (step + 1) / warm
        elif case.schedule == "constant":
            rate = peak
        else:
            rate = peak * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - warm) / (case.steps - 1 - warm))) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(cross_entropy.item())
    return losses, {name: value.detach() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_weights_are_those_of_the_plain_loop(name: str) -> None:
    losses, found = ours(CASES[name])
    expected, weights = plain(CASES[name])
    assert losses == pytest.approx(expected, abs=LOSS_TOLERANCE)
    assert expected[-1] < 0.8 * expected[0], "the comparison is about a model that learns"
    for key, value in found.items():
        difference = (value - weights[key]).norm() / weights[key].norm()
        assert difference < WEIGHT_TOLERANCE, key


@pytest.mark.parametrize(
    "wrong",
    [Case(z_loss=1e-2), Case(grad_clip=1.0), Case(weight_decay=0.1), Case(schedule="cosine")],
    ids=lambda case: str(case)[5:-1],
)
def test_a_part_left_out_is_noticed(wrong: Case) -> None:
    """The comparison above can fail: the plain loop without one of the parts is farther away than the tolerance."""
    with_part, weights = plain(wrong)
    without, other = plain(CASES["plain"])
    loss = max(abs(a - b) for a, b in zip(with_part, without, strict=True))
    moved = max(float((weights[key] - other[key]).norm() / other[key].norm()) for key in weights)
    assert loss > LOSS_TOLERANCE or moved > WEIGHT_TOLERANCE
