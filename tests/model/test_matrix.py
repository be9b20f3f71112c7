"""Products by half-precision copies against float64, and copies that follow their weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from minifoundation.config import ModelConfig, TrainConfig
from minifoundation.export.verify import random_state
from minifoundation.model.matrix import Matrix, refresh
from minifoundation.model.training import TrainingModel
from minifoundation.model.transformer import Transformer
from minifoundation.train.optimizer import adamw

CONFIG = ModelConfig(vocab_size=96, d_model=32, n_layer=1, n_head=4, n_kv_head=2, d_ff=48, original_seq_len=16)


def made(d_in: int, d_out: int, dtype: torch.dtype) -> Matrix:
    matrix = Matrix(d_in, d_out, dtype)
    torch.nn.init.normal_(matrix.weight, generator=torch.Generator().manual_seed(0))
    refresh([matrix])
    return matrix


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_values_and_gradients_are_those_of_the_rounded_weight(dtype: torch.dtype, error: float) -> None:
    matrix = made(20, 12, dtype)
    x = torch.randn(3, 5, 20).to(dtype).requires_grad_()
    d_out = torch.randn(3, 5, 12).to(dtype)
    found = torch.autograd.grad(matrix(x), (x, matrix.weight), d_out)
    exact_x, exact_weight = x.detach().double().requires_grad_(), matrix.weight.detach().to(dtype).double().requires_grad_()
    exact = torch.autograd.grad(exact_x @ exact_weight.T, (exact_x, exact_weight), d_out.double())
    assert (found[0].double() - exact[0]).norm() < error * exact[0].norm()
    torch.testing.assert_close(found[1], exact[1].float(), rtol=1e-5, atol=1e-5)  # not rounded to half precision


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_copy_that_is_given_is_that_of_the_weight_and_stays(interleaved: bool) -> None:
    given, own = (Matrix(20, 12, torch.bfloat16, interleaved=interleaved) for _ in range(2))
    torch.nn.init.normal_(own.weight)
    torch.nn.init.zeros_(given.weight)
    rows = given.new_rows()
    rows.copy_(own.weight.detach())
    given.take(rows)
    refresh([given, own])
    order = [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11] if interleaved else range(12)
    for matrix in (given, own):
        assert matrix.copy is not None and torch.equal(matrix.copy, own.weight.detach()[order].bfloat16())
    torch.nn.init.zeros_(given.weight)
    refresh([given])
    assert given.copy is not None and not given.copy.any()


def test_in_full_precision_there_is_no_copy() -> None:
    for dtype in (torch.float32, torch.float64):
        matrix = made(20, 12, dtype)
        x = torch.randn(5, 20, dtype=dtype)
        assert matrix.copy is None and torch.equal(matrix(x), x @ matrix.weight.to(dtype).T)


def step(model: Transformer) -> None:
    optimizer = adamw(dict(model.named_parameters()), TrainConfig(tokens=1, lr=0.1))
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()


def changed_in_place(model: Transformer) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)


@pytest.mark.parametrize(
    "change",
    [step, changed_in_place, lambda m: m.initialise(7), lambda m: m.load_state_dict(random_state(m.state_dict()))],
    ids=["a step of the fused optimizer", "a change in place", "initial weights", "a loaded state"],
)
@pytest.mark.parametrize("tie", [True, False])
def test_copies_follow_their_weights(change: Callable[[Transformer], object], tie: bool) -> None:
    """After ``change`` the model is the one that is made anew from the changed weights."""
    config = CONFIG.model_copy(update={"tie_embeddings": tie})
    model, tokens = Transformer(config, dtype=torch.bfloat16), torch.arange(16)[None]
    model.initialise(0)
    with torch.no_grad():
        before = model.logits(tokens)
        change(model)
        again = Transformer(config, dtype=torch.bfloat16)
        again.load_state_dict(model.state_dict())
        assert torch.equal(model.logits(tokens), again.logits(tokens))
        assert not torch.equal(model.logits(tokens), before)


def test_copies_are_made_again_only_for_changed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model, copied = Transformer(CONFIG, dtype=torch.bfloat16), 0
    model.initialise(0)
    real = torch._foreach_copy_

    def counting(copies: list[Tensor], weights: list[Tensor]) -> None:
        nonlocal copied
        copied += len(copies)
        real(copies, weights)

    monkeypatch.setattr(torch, "_foreach_copy_", counting)
    for _ in range(3):
        model(torch.arange(16)[None])
    assert copied == len(model.matrices) == 5
    changed_in_place(model.blocks[0].qkv)  # type: ignore[arg-type]
    model(torch.arange(16)[None])
    assert copied == 6


def test_copies_are_neither_saved_nor_trained() -> None:
    half, full = Transformer(CONFIG, dtype=torch.bfloat16), Transformer(CONFIG)
    assert half.state_dict().keys() == full.state_dict().keys()
    assert [name for name, _ in half.named_parameters()] == [name for name, _ in full.named_parameters()]


@pytest.mark.parametrize("tie", [True, False])
def test_every_gradient_of_the_model_is_near_that_in_float32(tie: bool) -> None:
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model = Transformer(CONFIG.model_copy(update={"tie_embeddings": tie}), dtype=dtype)
        model.load_state_dict(random_state(model.state_dict()))
        tokens = torch.randint(96, (2, 17), generator=torch.Generator().manual_seed(1))
        losses = TrainingModel(model, z_loss=1e-3, chunk=10)(tokens[:, :-1], tokens[:, 1:])
        gradients.append(torch.autograd.grad(losses.total, list(model.parameters())))
    for exact, found in zip(*gradients, strict=True):
        assert found.dtype == torch.float32 and (found - exact).norm() < 0.05 * exact.norm()
