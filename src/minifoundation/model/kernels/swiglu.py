"""The product of SwiGLU (arXiv:2002.05202) and its gradients, each in one pass over memory.

Letters: N tokens, D model width, F feed-forward width. Gate and up are the halves of one matrix (N, 2F), as one product makes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minifoundation.model.kernels.language import jit, runs_on, tl
from minifoundation.model.matrix import weight_gradient

COLUMNS = 2048  # with 256 threads 16 bytes a load


def gated_product(gate_up: Tensor, weight: Tensor, copy: Tensor) -> Tensor:
    """Return (silu(gate) * up) copy^T, (..., D), of gate and up (..., 2F); only they are kept, the product is made again in the backward.

    Args:
        weight: takes the gradient of its ``copy`` (D, F), in float32.
    """
    result: Tensor = _GatedProduct.apply(gate_up, weight, copy)  # type: ignore[no-untyped-call]
    return result


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, copy)
        return torch.matmul(product(gate_up), copy.T)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        gate_up, copy = ctx.saved_tensors
        d_gate_up, again = gradients(gate_up, d_out @ copy)
        return d_gate_up, weight_gradient(d_out.flatten(0, -2), again.flatten(0, -2)), None


def plain_product(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, (N, F), computed in float32 and rounded once."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (gate * gate.sigmoid() * up).to(gate_up.dtype)


def plain_gradients(gate_up: Tensor, d_product: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``gate_up`` for that of the product, and the product again, which then need not be kept."""
    wide = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(wide).chunk(2, dim=-1)
    d = d_product.to(wide)
    s = gate.sigmoid()
    d_gate, d_up = d * up * s * (1 + gate * (1 - s)), d * gate * s
    return torch.cat((d_gate, d_up), dim=-1).to(gate_up.dtype), (gate * s * up).to(gate_up.dtype)


@torch.library.custom_op("minifoundation::swiglu", mutates_args=())
def product(gate_up: Tensor) -> Tensor:
    """Return ``plain_product``."""
    if not runs_on(gate_up):
        return plain_product(gate_up)
    out = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    launch_product(gate_up, out)
    return out


@torch.library.custom_op("minifoundation::swiglu_gradients", mutates_args=())
def gradients(gate_up: Tensor, d_product: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``plain_gradients``."""
    if not runs_on(gate_up):
        return plain_gradients(gate_up, d_product)
    d_gate_up, again = torch.empty_like(gate_up), torch.empty_like(d_product)
    launch_gradients(gate_up, d_product, d_gate_up, again)
    return d_gate_up, again


@product.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@gradients.register_fake
def _(gate_up: Tensor, d_product: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(gate_up), torch.empty_like(d_product)


def launch_product(gate_up: Tensor, out: Tensor) -> None:
    """Write the product to ``out``; both contiguous."""
    F = out.shape[-1]
    _product[(out.numel() // F, -(-F // COLUMNS))](gate_up, out, F, COLUMNS=COLUMNS, num_warps=8)


def launch_gradients(gate_up: Tensor, d_product: Tensor, d_gate_up: Tensor, again: Tensor) -> None:
    """Write the gradient of ``gate_up`` and the product; all contiguous."""
    F = d_product.shape[-1]
    _gradients[(d_product.numel() // F, -(-F // COLUMNS))](gate_up, d_product, d_gate_up, again, F, COLUMNS=COLUMNS, num_warps=8)


@jit
def _product(gate_up, out, F, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < F
    gate = tl.load(gate_up + row * 2 * F + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + column, mask=inside).to(tl.float32)
    tl.store(out + row * F + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=inside)


@jit
def _gradients(gate_up, d_product, d_gate_up, again, F, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < F
    gate = tl.load(gate_up + row * 2 * F + column, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + column, mask=inside).to(tl.float32)
    d = tl.load(d_product + row * F + column, mask=inside).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(d_gate_up + row * 2 * F + column, (d * up * s * (1 + gate * (1 - s))).to(d_gate_up.dtype.element_ty), mask=inside)
    tl.store(d_gate_up + row * 2 * F + F + column, (d * gate * s).to(d_gate_up.dtype.element_ty), mask=inside)
    tl.store(again + row * F + column, (gate * s * up).to(again.dtype.element_ty), mask=inside)
