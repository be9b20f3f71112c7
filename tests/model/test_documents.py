"""Attention within documents against each document run apart."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minifoundation.config import ModelConfig, RopeConfig
from minifoundation.export.verify import random_state
from minifoundation.model.attention import Backend, attend, documents_for
from minifoundation.model.rope import positions_within
from minifoundation.model.transformer import Block, Transformer

TOLERANCE = 1e-5
ROWS, LENGTH = 2, 24


def model(**changes: Any) -> Transformer:
    """Return a model with large random weights: in one as initialised attention is nearly uniform, and faults hardly show."""
    sizes = {"vocab_size": 256, "d_model": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 96, "original_seq_len": LENGTH}
    transformer = Transformer(ModelConfig.model_validate(sizes | changes))
    transformer.load_state_dict(random_state(transformer.state_dict()))
    return transformer


def offsets(*boundaries: int, rows: int = ROWS, length: int = LENGTH) -> Tensor:
    """Return the cu_seqlens of rows that are cut at ``boundaries`` of their flattened tokens."""
    return torch.tensor(sorted({*boundaries, *range(0, rows * length + 1, length)}), dtype=torch.int32)


def tokens_and_weights(rows: int = ROWS, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    return torch.randint(256, (rows, length), generator=random), torch.randn(rows * length, 256, generator=random)


def apart(transformer: Transformer, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Return the logits (B * T, V) of documents that are each a batch of their own."""
    flat = tokens.flatten()
    return torch.cat([transformer.logits(flat[None, a:b])[0] for a, b in itertools.pairwise(cu_seqlens.tolist())])


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@settings(max_examples=16, deadline=None)
@given(st.sets(st.integers(1, ROWS * LENGTH - 1)), st.sampled_from(["auto", "math"]), st.sampled_from(["none", "yarn"]), st.booleans())
def test_logits_and_gradients_are_those_of_the_documents_apart(cuts: set[int], kernel: str, scaling: str, qk_norm: bool) -> None:
    rope = RopeConfig.model_validate({"scaling": scaling, "factor": 4 if scaling == "yarn" else 1})
    transformer = model(attention=kernel, rope=rope, qk_norm=qk_norm)
    cu_seqlens = offsets(*cuts)
    tokens, weights = tokens_and_weights()
    found, expected = transformer.logits(tokens, cu_seqlens).flatten(0, 1), apart(transformer, tokens, cu_seqlens)
    assert difference(found, expected) < TOLERANCE
    parameters = list(transformer.parameters())
    for ours, theirs in zip(
        torch.autograd.grad((found * weights).sum(), parameters), torch.autograd.grad((expected * weights).sum(), parameters), strict=True
    ):
        assert difference(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("wrong", [None, offsets(), offsets(5, 30), offsets(6, 30, 31), offsets(7, 30)], ids=str)
def test_a_wrong_mask_is_noticed(wrong: Tensor | None) -> None:
    """No mask, rows alone, a boundary one token early, one too many, one token late: each far above the tolerance."""
    transformer, (tokens, _) = model(), tokens_and_weights()
    with torch.no_grad():
        expected = apart(transformer, tokens, offsets(6, 30))
        assert difference(transformer.logits(tokens, wrong).flatten(0, 1), expected) > 1000 * TOLERANCE


def test_positions_that_do_not_restart_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores depend on distances alone, so all that shows is the rounding of large angles: far along a row it does."""
    length, start = 4096, 4000
    transformer, (tokens, _) = model(n_layer=1), tokens_and_weights(1, length)
    cu_seqlens = offsets(start, rows=1, length=length)
    with torch.no_grad():
        expected = transformer.logits(tokens[:, start:])
        assert difference(transformer.logits(tokens, cu_seqlens)[:, start:], expected) < TOLERANCE / 10
        mask = documents_for("auto", cu_seqlens, positions_within(cu_seqlens, 1, length), torch.float32)
        monkeypatch.setattr("minifoundation.model.transformer.documents_for", lambda *_: mask)
        monkeypatch.setattr("minifoundation.model.transformer.positions_within", lambda *_: torch.arange(length)[None])
        assert difference(transformer.logits(tokens, cu_seqlens)[:, start:], expected) > TOLERANCE


@pytest.mark.parametrize("kernel", ["auto", "math"])
def test_rows_of_one_document_each_are_rows(kernel: str) -> None:
    transformer, (tokens, _) = model(attention=kernel), tokens_and_weights()
    with torch.no_grad():
        assert difference(transformer.logits(tokens, offsets()), transformer.logits(tokens)) < TOLERANCE


@pytest.mark.parametrize("kernel", ["auto", "math"])
def test_attention_is_that_of_the_documents_apart(kernel: Backend) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(ROWS, LENGTH, heads, 8, dtype=torch.float64) for heads in (6, 2, 2))
    cu_seqlens = offsets(1, 9, 23, 40)
    out = attend(q, k, v, kernel, documents_for(kernel, cu_seqlens, positions_within(cu_seqlens, ROWS, LENGTH), q.dtype))
    flat_q, flat_k, flat_v = (x.flatten(0, 1)[None] for x in (q, k, v))
    spans = [slice(a, b) for a, b in itertools.pairwise(cu_seqlens.tolist())]
    parts = [attend(flat_q[:, span], flat_k[:, span], flat_v[:, span], kernel) for span in spans]
    torch.testing.assert_close(out.flatten(0, 1), torch.cat(parts, dim=1)[0])


def test_positions_count_from_the_beginning_of_a_document() -> None:
    assert positions_within(offsets(2, 6, rows=2, length=5), 2, 5).tolist() == [[0, 1, 0, 1, 2], [0, 0, 1, 2, 3]]


@pytest.mark.filterwarnings("default")  # torch's own, while it compiles
def test_the_variable_length_kernel_is_compiled_once_for_any_number_of_documents() -> None:
    """Traced forward and backward on tensors without data: the kernel itself needs a GPU."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    block = Block(model().config, dtype=torch.bfloat16, checkpointing="attention").to("meta")
    block.compile(dynamic=False, backend="aot_eager", fullgraph=True)
    cos, sin, positions = (torch.empty(ROWS, LENGTH, width, device="meta") for width in (8, 8, 1))
    for n_documents in (2, 5, ROWS * LENGTH):
        x = torch.empty(ROWS, LENGTH, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
        cu_seqlens = torch.empty(n_documents + 1, dtype=torch.int32, device="meta")
        out = block(x, cos, sin, "flash", documents_for("flash", cu_seqlens, positions[..., 0], x.dtype))
        assert torch.autograd.grad(out.sum(), x)[0].shape == out.shape == x.shape
    assert counters["stats"]["unique_graphs"] == 1
