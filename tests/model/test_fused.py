"""The blocks by hand against the plain ones: equal in float64, near in half precision and in 8 bits; what they keep for the backward."""

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

from minifoundation.config import ModelConfig
from minifoundation.model import transformer
from minifoundation.model.fp8 import Sites
from minifoundation.model.kernels import gated, swiglu
from minifoundation.model.training import TrainingModel
from minifoundation.model.transformer import Transformer

SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "d_model": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 2,
    "d_ff": 96,
    "original_seq_len": 64,
    "init_std": 0.2,  # large, or attention is uniform and a wrong rotation does not show
}
TOKENS = torch.randint(512, (2, 48), generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.randn(2, 48, 64, generator=torch.Generator().manual_seed(1))
CU_SEQLENS = torch.tensor([0, 10, 48, 50, 77, 96], dtype=torch.int32)


def result(model: Transformer, *, masked: bool = False) -> dict[str, Tensor]:
    """Return the hidden states and all gradients."""
    model.zero_grad()
    hidden = model(TOKENS, CU_SEQLENS if masked else None)
    hidden.mul(WEIGHTS.to(hidden.dtype)).sum().backward()
    return {"hidden": hidden.detach(), **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}


def by_hand(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> Transformer:
    """Have ``model`` take the blocks by hand where it would not."""
    monkeypatch.setattr(model, "by_hand_on", lambda _: True)
    return model


def largest_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    assert found.keys() == exact.keys()
    return max(float((found[n].double() - exact[n].double()).norm() / exact[n].double().norm()) for n in exact)


@pytest.mark.parametrize("checkpointing", ["none", "attention", "full"])
@pytest.mark.parametrize(("qk_norm", "masked"), [(False, False), (True, False), (False, True), (True, True)])
def test_it_is_the_plain_block_in_float64(qk_norm: bool, masked: bool, checkpointing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.model_validate({**SMALL, "qk_norm": qk_norm, "checkpointing": checkpointing})
    model = Transformer(config, dtype=torch.float64).double()
    model.initialise(0)
    plain = result(model, masked=masked)
    assert len(plain) == 1 + len(list(model.parameters()))
    # The plain block turns queries and keys in float32 tables of the same angles.
    assert largest_error(result(by_hand(model, monkeypatch), masked=masked), plain) < 1e-6


def test_half_precision_is_as_near_as_the_plain_block(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = Transformer(ModelConfig.model_validate(SMALL))
    exact.initialise(0)
    expected = result(exact)
    half = Transformer(ModelConfig.model_validate(SMALL), dtype=torch.bfloat16)
    half.initialise(0)
    plain = largest_error(result(half), expected)
    assert 0 < largest_error(result(by_hand(half, monkeypatch)), expected) < 1.2 * plain


def test_gate_and_up_in_turn_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """With plain stand-ins for the products of QuACK, which run on a GPU alone."""

    def halves(gates: Tensor) -> Tensor:
        return torch.cat(gates.unflatten(-1, (-1, 2)).unbind(-1), dim=-1)

    def product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        gates = x @ weight.T
        return gates, swiglu.plain_product(halves(gates))

    def gradients(d_out: Tensor, down: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
        d_gates, activated = swiglu.plain_gradients(halves(gates), d_out @ down)
        return torch.stack(d_gates.chunk(2, dim=-1), dim=-1).flatten(-2), activated

    monkeypatch.setattr(gated, "product", product)
    monkeypatch.setattr(gated, "gradients", gradients)
    monkeypatch.setattr(gated, "sum_with_product", lambda residual, x, weight: residual + x @ weight.T)
    found = []
    for in_epilogue in (False, True):
        model = Transformer(ModelConfig.model_validate(SMALL), dtype=torch.bfloat16, in_epilogue=in_epilogue)
        model.initialise(0)
        found.append(result(by_hand(model, monkeypatch)))
    assert largest_error(found[1], found[0]) < 1e-3


def test_8_bits_are_near_and_their_scales_settle() -> None:
    exact = Transformer(ModelConfig.model_validate(SMALL))
    exact.initialise(0)
    expected = result(exact)
    small = Transformer(ModelConfig.model_validate(SMALL), dtype=torch.bfloat16, fp8=True)
    small.initialise(0)
    assert small.scales is not None
    scales = []
    for _ in range(4):
        found = result(small)
        small.scales.update()
        scales.append(small.scales.scale.clone())
    assert torch.equal(scales[-1], scales[-2]) and not torch.equal(scales[-1], scales[0])
    # Three and two bits of mantissa round a value by 2.6 and 5.2% on average; large weights and narrow sums make the most of it.
    error = {name: float((found[name].double() - value.double()).norm() / value.double().norm()) for name, value in expected.items()}
    assert error["hidden"] < 0.25 and statistics.median(error.values()) < 0.5 and max(error.values()) < 0.75, error


def test_evaluation_leaves_the_scales_alone() -> None:
    small = Transformer(ModelConfig.model_validate(SMALL), dtype=torch.bfloat16, fp8=True)
    small.initialise(0)
    model = TrainingModel(small, z_loss=1e-4, chunk=40)
    assert small.scales is not None
    with torch.no_grad():
        evaluated = model(TOKENS, TOKENS)
    assert not small.scales.largest.any()
    trained = model(TOKENS, TOKENS)
    trained.total.backward()
    assert (small.scales.largest.amax(1) > 0).all() and torch.equal(trained.cross_entropy, evaluated.cross_entropy)


@pytest.mark.parametrize("fp8", [False, True])
def test_it_keeps_no_more_than_it_reads_again(fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs of both norms and their factors, the gates; what attention mixed, in 8 bits where products are. Attention keeps its own."""
    model = by_hand(Transformer(ModelConfig.model_validate({**SMALL, "n_layer": 1}), dtype=torch.bfloat16, fp8=fp8), monkeypatch)
    model.initialise(0)
    model(TOKENS)  # makes the copies
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in others:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(2, 48, 64).bfloat16().requires_grad_()
    tables = torch.ones(48, 8), torch.zeros(48, 8)
    sites = Sites() if model.scales is None else model.scales.sites(0, watched=True)
    others = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *tables)}
    monkeypatch.setattr(transformer, "attend", lambda q, k, v, kernel, documents: q * 1)  # keeps nothing
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.blocks[0](x, *tables, "math", None, sites)
    assert sum(kept.values()) == TOKENS.numel() * (2 * (64 + 64 + 2 * 96) + 2 * 4 + (64 if fp8 else 2 * 64))
