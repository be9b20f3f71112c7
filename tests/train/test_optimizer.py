"""Which weights decay, and AdamW against its equations."""

import math

import pytest
import torch
from torch import nn

from minifoundation.config import ModelConfig, TrainConfig
from minifoundation.distributed import World
from minifoundation.errors import UserError
from minifoundation.model.transformer import Transformer
from minifoundation.train.optimizer import adamw, clip, decayed, set_learning_rate


@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_of_the_blocks_and_an_untied_head_decay(tied: bool) -> None:
    model = Transformer(
        ModelConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, n_kv_head=1, d_ff=24, qk_norm=True, tie_embeddings=tied)
    )
    names = {name.rsplit(".", 2)[-2] for name, parameter in model.named_parameters() if decayed(name, parameter)}
    assert names == {"qkv", "out", "gate_up", "down"} | (set() if tied else {"head"})


def test_one_update_is_the_equation_of_the_paper() -> None:
    layer = nn.Linear(3, 2, bias=True)
    config = TrainConfig(tokens=1, lr=0.1, weight_decay=0.5, beta1=0.9, beta2=0.95, eps=1e-8)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = adamw(dict(layer.named_parameters()), config)
    gradient = torch.tensor([[1.0, -2.0, 0.5], [0.1, 0.0, 3.0]])
    for step in (1, 2):
        layer.weight.grad, layer.bias.grad = gradient * step, torch.ones(2) * step
        optimizer.step()
    m = v = torch.zeros(2, 3)
    for step in (1, 2):
        g = gradient * step
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        weight = weight * (1 - 0.1 * 0.5)
        weight = weight - 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
    torch.testing.assert_close(layer.weight.detach(), weight, atol=1e-6, rtol=1e-6)
    assert torch.all((bias - layer.bias.detach()) > 0.19), "the bias moves by about lr a step and does not decay"


def test_the_rate_reaches_every_group() -> None:
    optimizer = adamw(dict(nn.Linear(2, 2).named_parameters()), TrainConfig(tokens=1))
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert math.isclose(optimizer.param_groups[0]["weight_decay"], 0.1) and optimizer.param_groups[1]["weight_decay"] == 0


def test_int8_without_torchao_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"train\.optimizer_states: int8 needs torchao; pip install"):
        adamw(dict(nn.Linear(2, 2).named_parameters()), TrainConfig(tokens=1, optimizer_states="int8"))


@pytest.mark.parametrize("largest", [None, 1e-3, 0.5, 1e6])
def test_clipping_inside_the_fused_step_is_clipping_before_it(largest: float | None) -> None:
    weights = []
    for fused in (True, False):
        layer = nn.Linear(3, 2)
        with torch.no_grad():
            layer.weight.fill_(1.0)
            layer.bias.fill_(0.5)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, eps=1e-2, fused=fused)  # a large eps, so that the scale shows
        for step in (1, 2):
            layer.weight.grad, layer.bias.grad = torch.arange(6.0).view(2, 3) * step, torch.ones(2)
            norm = clip(optimizer, largest, World())
            assert float(norm) == pytest.approx(math.sqrt(55 * step**2 + 2))
            optimizer.step()
        weights.append(layer.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_machines_that_sum_in_other_orders_clip_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """As two that each hold all rows: NCCL may add up their squares differently, and the weights would drift apart."""
    asked = []

    def least(_world: World, values: torch.Tensor) -> torch.Tensor:
        asked.append(float(values))
        return values.sub_(1.0)

    monkeypatch.setattr(World, "least", least)
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    assert float(clip(optimizer, 1.0, World(size=4, local_size=4))) == 5 and not asked
    assert float(clip(optimizer, 1.0, World(size=4, local_size=2))) == 4 and asked == [5]
    assert float(optimizer.grad_scale) == pytest.approx(4)  # type: ignore[attr-defined]
