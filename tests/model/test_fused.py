"""The blocks by hand against the plain ones: equal in float64, near in half precision and in 8 bits; what they keep for the backward."""

import statistics
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from minifoundation.config import ModelConfig
from minifoundation.model import attention, fused, transformer
from minifoundation.model.fp8 import Sites
from minifoundation.model.kept import Kept
from minifoundation.model.kernels import gated, swiglu
from minifoundation.model.size import _saved_by_block
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


class Aside:
    """Stands for copies to host memory; counts them."""

    def __init__(self) -> None:
        self.away_bytes = self.back_bytes = 0

    def away(self, flat: Tensor) -> Callable[[], Callable[[], Tensor]]:
        host = flat.numpy(force=True).copy() if flat.dtype != torch.bfloat16 else flat.clone()
        self.away_bytes += flat.nbytes

        def fetched() -> Callable[[], Tensor]:
            self.back_bytes += flat.nbytes
            back = torch.as_tensor(host).clone()
            return lambda: back

        return fetched


@pytest.mark.parametrize("checkpointing", ["none", "attention", "offload", "full"])
@pytest.mark.parametrize(
    ("qk_norm", "masked", "head_dim"),
    [(False, False, 16), (True, False, 16), (False, True, 16), (True, True, 16), (False, True, 24), (True, False, 8)],
)
def test_it_is_the_plain_block_in_float64(
    qk_norm: bool, masked: bool, head_dim: int, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig.model_validate({**SMALL, "qk_norm": qk_norm, "checkpointing": checkpointing, "head_dim": head_dim})
    model = Transformer(config, dtype=torch.float64).double()
    model.initialise(0)
    plain = result(model, masked=masked)
    assert len(plain) == 1 + len(list(model.parameters()))
    copies = Aside()
    monkeypatch.setattr(model, "copies", lambda _device: copies)
    monkeypatch.setattr(fused, "AT_ONCE", 40)  # three parts, the last one short
    # The plain block turns queries and keys in float32 tables of the same angles.
    assert largest_error(result(by_hand(model, monkeypatch), masked=masked), plain) < 1e-6
    # Of both blocks the input, 64 wide, and what attention mixed, as wide as the heads are together, once each.
    away = 2 * (64 + 4 * head_dim) * TOKENS.numel() * 8 if checkpointing == "offload" else 0
    assert copies.away_bytes == copies.back_bytes == away


@pytest.mark.parametrize("head_dim", [None, 32])
def test_half_precision_is_as_near_as_the_plain_block(head_dim: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.model_validate({**SMALL, "head_dim": head_dim})
    exact = Transformer(config)
    exact.initialise(0)
    expected = result(exact)
    half = Transformer(config, dtype=torch.bfloat16)
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
    # Weights that come in half precision, as FSDP gathers them, are turned where they are used; their gradients are rounded to it.
    gathered = Transformer(ModelConfig.model_validate(SMALL), dtype=torch.bfloat16, in_epilogue=True, copies=False)
    gathered.initialise(0)
    for weight in gathered.parameters():
        weight.data = weight.data.bfloat16()
    assert largest_error(result(by_hand(gathered, monkeypatch)), found[0]) < 1e-2


@pytest.mark.parametrize("head_dim", [None, 32])
def test_8_bits_are_near_and_their_scales_settle(head_dim: int | None) -> None:
    config = ModelConfig.model_validate({**SMALL, "head_dim": head_dim})
    exact = Transformer(config)
    exact.initialise(0)
    expected = result(exact)
    small = Transformer(config, dtype=torch.bfloat16, fp8=True)
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


class KeepsAll(torch.autograd.Function):
    """Stands for attention: gives the queries, and keeps what a kernel does."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.clone(memory_format=torch.contiguous_format)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, k, v, _ = ctx.saved_tensors
        return d_out, torch.zeros_like(k), torch.zeros_like(v)


@pytest.mark.parametrize("checkpointing", ["none", "attention"])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize(("fp8", "head_dim"), [(False, 16), (True, 16), (False, 32), (True, 32)])
def test_it_keeps_no_more_than_it_reads_again(
    fp8: bool, head_dim: int, qk_norm: bool, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs of both norms and their factors, heads, what attention mixed (once more in 8 bits where products are), the gates.

    With QK-norm heads before it and after. Of all this selective checkpointing keeps the block's input and what attention mixed.
    """
    config = ModelConfig.model_validate({**SMALL, "n_layer": 1, "head_dim": head_dim, "qk_norm": qk_norm, "checkpointing": checkpointing})
    model = by_hand(Transformer(config, dtype=torch.bfloat16, fp8=fp8), monkeypatch)
    model.initialise(0)
    model(TOKENS)  # makes the copies
    held: dict[int, int] = {}

    class Counted(Kept):
        def pack(self, tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in others:
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

    x = torch.randn(2, 48, 64).bfloat16().requires_grad_()
    tables = torch.ones(48, head_dim // 2), torch.zeros(48, head_dim // 2)
    sites = Sites() if model.scales is None else model.scales.sites(0, watched=True)
    others = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *tables)}
    monkeypatch.setattr(transformer, "attend", lambda q, k, v, *_: KeepsAll.apply(q, k, v))  # type: ignore[no-untyped-call]
    counted = Counted()
    with torch.autograd.graph.saved_tensors_hooks(counted.pack, counted.unpack):
        model.blocks[0](x, *tables, "math", None, sites, counted)
    queries, keys = 4 * head_dim, 2 * head_dim
    if checkpointing == "attention":
        values = 64 + queries + 2  # and one factor
    else:
        heads = (queries + 2 * keys) + (queries + keys if qk_norm else 0)
        values = 64 + 64 + 2 * 96 + heads + queries + 2 * 2 + (queries // 2 if fp8 else 0)
    # With QK-norm the rotation of a Function's own is by hand no more: it keeps tables of nothing, half a head wide.
    assert sum(held.values()) == TOKENS.numel() * 2 * values + (2 * 4 * head_dim // 2 if qk_norm else 0)
    if checkpointing == "none":  # so much is predicted, and what attention keeps of each head beside
        assert 2 * values + 4 * config.n_head == _saved_by_block(config, 2) + (queries if fp8 else 0)


@pytest.mark.parametrize("checkpointing", ["attention", "offload"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_heads_are_gone_after_the_forward(checkpointing: str, qk_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only is nothing of them saved: nothing else holds them either."""
    model = by_hand(
        Transformer(ModelConfig.model_validate({**SMALL, "qk_norm": qk_norm, "checkpointing": checkpointing}), dtype=torch.bfloat16),
        monkeypatch,
    )
    model.initialise(0)
    monkeypatch.setattr(model, "copies", lambda _device: Aside())
    alive: list[weakref.ref[torch.UntypedStorage]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        alive.extend(weakref.ref(tensor.untyped_storage()) for tensor in (q, k, v))
        return KeepsAll.apply(q, k, v)  # type: ignore[no-untyped-call,no-any-return]

    monkeypatch.setattr(transformer, "attend", attend)
    hidden = model(TOKENS)
    assert len(alive) == 6 and all(storage() is None for storage in alive)
    hidden.sum().backward()


class Gathered:
    """The context of rows that are here as a whole, in the order in which two chunks of them would lie; remembers what it gathers."""

    size = 1

    def __init__(self) -> None:
        self.alive: list[weakref.ref[torch.UntypedStorage]] = []

    def chunks(self, seq_len: int) -> list[tuple[int, int]]:
        return [(0, seq_len // 2), (seq_len // 2, seq_len)]

    def gathered(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = torch.stack((k, v)).unbind()
        self.alive.append(weakref.ref(keys.untyped_storage()))
        return keys, values


@pytest.mark.parametrize("checkpointing", ["none", "attention", "offload", "full"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_keys_and_values_of_whole_rows_are_gathered_again(checkpointing: str, qk_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are gone after the forward, and the gradients are those of a model that reads whole rows."""
    config = ModelConfig.model_validate({**SMALL, "qk_norm": qk_norm, "checkpointing": checkpointing})
    context = Gathered()
    model = Transformer(config, dtype=torch.float64, context=context).double()
    model.initialise(0)
    plain = Transformer(config, dtype=torch.float64).double()
    plain.load_state_dict(model.state_dict())
    for one in (plain, model):
        monkeypatch.setattr(one, "copies", lambda _device: Aside())
        by_hand(one, monkeypatch)
    expected = result(plain)
    hidden = model(TOKENS)
    assert len(context.alive) == 2 and all(storage() is None for storage in context.alive)
    hidden.mul(WEIGHTS).sum().backward()
    assert len(context.alive) == 4 and all(storage() is None for storage in context.alive)
    found = {"hidden": hidden.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}
    assert largest_error(found, expected) < 1e-12


def test_parts_of_a_row_are_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 8 bits too, where a scale must see the largest value of all parts."""
    found = []
    for at_once in (96, 32):
        monkeypatch.setattr(fused, "AT_ONCE", at_once)
        model = Transformer(ModelConfig.model_validate({**SMALL, "checkpointing": "attention"}), dtype=torch.bfloat16, fp8=True)
        model.initialise(0)
        assert model.scales is not None
        found.append((result(model), model.scales.largest.amax(1)))
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][0]["hidden"], found[1][0]["hidden"]) and largest_error(found[1][0], found[0][0]) < 1e-5


def test_rows_of_one_document_need_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that kernels which know no documents can do them."""
    model = by_hand(Transformer(ModelConfig.model_validate(SMALL), dtype=torch.bfloat16, rows="math"), monkeypatch)
    model.initialise(0)
    seen = []

    def attend(q: Tensor, k: Tensor, v: Tensor, kernel: Any, mask: Any = None) -> Tensor:
        seen.append((kernel, mask is None))
        return attention.attend(q, k, v, kernel, mask)

    monkeypatch.setattr(transformer, "attend", attend)
    with torch.no_grad():
        whole, plain = model(TOKENS, torch.tensor([0, 48, 96], dtype=torch.int32)), model(TOKENS)
    assert largest_error({"hidden": whole}, {"hidden": plain}) < 0.02  # another kernel, in half precision
    model(TOKENS, CU_SEQLENS)
    assert seen[:2] == [("math", True)] * 2 and seen[2] == ("auto", True) and seen[-1] == ("auto", False)
