from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from minifoundation.config import ModelConfig
from minifoundation.model.training import TrainingModel
from minifoundation.model.transformer import Transformer


@pytest.mark.parametrize("tie", [True, False])
def test_losses_and_gradients_are_those_of_the_logits(tie: bool) -> None:
    config = ModelConfig(vocab_size=96, d_model=32, n_layer=2, n_head=4, n_kv_head=2, d_ff=48, original_seq_len=16, tie_embeddings=tie)
    transformer = Transformer(config)
    transformer.initialise(0)
    tokens = torch.randint(96, (3, 17), generator=torch.Generator().manual_seed(0))
    targets = tokens[:, 1:].clone()
    targets[0, :5] = -100
    losses = TrainingModel(transformer, z_loss=1e-2, chunk=7)(tokens[:, :-1], targets)
    found = torch.autograd.grad(losses.total, list(transformer.parameters()))

    logits = transformer.logits(tokens[:, :-1])
    z = 1e-2 * (logits.logsumexp(-1)[targets != -100] ** 2).sum()
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") + z
    torch.testing.assert_close(losses.total, plain)
    torch.testing.assert_close(found, torch.autograd.grad(plain, list(transformer.parameters())), rtol=1e-4, atol=1e-4)
    assert losses.tokens == 3 * 16 - 5


def test_one_batch_can_be_overfitted() -> None:
    config = ModelConfig(vocab_size=96, d_model=32, n_layer=2, n_head=4, n_kv_head=2, d_ff=48, original_seq_len=16)
    model = TrainingModel(Transformer(config), z_loss=1e-4, chunk=16)
    model.transformer.initialise(0)
    tokens = torch.randint(96, (4, 17), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        losses = model(tokens[:, :-1], tokens[:, 1:])
        (losses.total / losses.tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses.cross_entropy / losses.tokens < 0.05
