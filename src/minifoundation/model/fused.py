"""A block by hand: two functions around attention, each product's neighbours done in one pass over memory, backward included.

They compute what ``Block.branches`` does, which is their definition and runs elsewhere, and serve half precision and 8 bits alike: an
operand of a product is a tensor, or rounded by the kernel that makes it. Normed values and SwiGLU's product are not kept: the backward's
kernels make them again from what they read anyway.

Letters: B rows, T tokens a row, N = B T, D model width, H query heads, K key/value heads, h head width, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minifoundation.model.fp8 import Sites
from minifoundation.model.kernels import gated, norm, quantise, rope, swiglu
from minifoundation.model.kernels.quantise import Rounded, Site
from minifoundation.model.matrix import Operand, input_gradient, product, weight_gradient


def _operand(values: Tensor, site: Site | None) -> Operand:
    return values if site is None else quantise.rounded(values, site)


def _kept(operand: Operand) -> tuple[Tensor | None, Tensor]:
    """Return what the backward needs of a weight: of 8 bits the transposed layout and 1 / scale, else the values."""
    return (operand.columns, operand.inverse) if isinstance(operand, Rounded) else (None, operand)


def _of(columns: Tensor | None, other: Tensor) -> Operand:
    return other if columns is None else Rounded(None, columns, other)


class AttentionInputs(torch.autograd.Function):
    """Norm, query-key-value product and rotation: x (N, D) to q (B, T, H, h), k and v (B, T, K, h), and x again for what comes after.

    The x that comes out is the residual: its gradient is added where the norm's own is made.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gain: Tensor,
        weight: Tensor,
        operand: Operand,
        eps: float,
        tables: tuple[Tensor, Tensor] | None,
        shape: tuple[int, int, int, int, int],
        sites: Sites,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        B, T, H, K, h = shape
        _, normed, factor = norm.normed(x, None, gain, eps, sites.attention_in)
        heads = product(normed, operand).view(-1, H + 2 * K, h)
        if tables is not None:
            rope.rotated_(heads, *tables, H + K)
        cos, sin = tables or (torch.ones(1, h // 2, device=x.device), torch.zeros(1, h // 2, device=x.device))
        ctx.save_for_backward(x, gain, factor, cos, sin, *_kept(operand))
        ctx.sites = sites
        q, k, v = heads.view(B, T, H + 2 * K, h).split([H, K, K], dim=2)
        return q, k, v, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor, d_x: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, factor, cos, sin, columns, other = ctx.saved_tensors
        sites: Sites = ctx.sites
        d_q, d_k, d_v = (d.flatten(0, 1).contiguous() for d in (d_q, d_k, d_v))
        d_heads = rope.merged(d_q, d_k, d_v, cos, sin, sites.d_heads)
        d_normed = input_gradient(d_heads, _of(columns, other))
        d, _, d_gain, normed = norm.gradients(d_normed, x, factor, gain, d_x.contiguous(), sites.attention_in, None)
        return d, d_gain, weight_gradient(d_heads, normed), None, None, None, None, None


class AfterAttention(torch.autograd.Function):
    """Output product, norm and SwiGLU with their residuals: x (N, D) and what attention mixed (N, H h) to the block's output (N, D).

    With ``in_epilogue`` gate and up are interleaved in their operand, and SwiGLU is done by the products beside it (``kernels/gated.py``).
    """

    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        x: Tensor,
        out: Tensor,
        gain: Tensor,
        gate_up: Tensor,
        down: Tensor,
        operands: tuple[Operand, Operand, Operand],
        eps: float,
        sites: Sites,
        in_epilogue: bool,
    ) -> Tensor:
        of_out, of_gate_up, of_down = operands
        small = _operand(mixed, sites.mixed)
        y, normed, factor = norm.normed(x, product(small, of_out), gain, eps, sites.mlp_in)
        if in_epilogue:
            assert isinstance(normed, Tensor) and isinstance(of_gate_up, Tensor) and isinstance(of_down, Tensor)
            gates, activated = gated.product(normed, of_gate_up)
            result = gated.sum_with_product(y, activated, of_down)
        else:
            gates = product(normed, of_gate_up)
            result = product(swiglu.product(gates, sites.product), of_down).add_(y)
        kept = (part for operand in (small, *operands) for part in _kept(operand))
        ctx.save_for_backward(y, gain, factor, gates, *kept)
        ctx.sites, ctx.in_epilogue = sites, in_epilogue
        return result

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        y, gain, factor, gates, *kept = ctx.saved_tensors
        mixed, out, gate_up, down = (_of(*pair) for pair in zip(kept[::2], kept[1::2], strict=True))
        sites: Sites = ctx.sites
        d_out = d_out.contiguous()  # kernels read it by rows; the gradient of a sum is one number, spread
        d_mlp = _operand(d_out, sites.d_mlp)
        d_gates: Operand
        activated: Operand
        if ctx.in_epilogue:
            assert isinstance(d_mlp, Tensor) and isinstance(down, Tensor)
            d_gates, activated = gated.gradients(d_mlp, down, gates)
        else:
            d_gates, activated = swiglu.gradients(gates, input_gradient(d_mlp, down), sites.product, sites.d_gate_up)
        d_down = weight_gradient(d_mlp, activated)
        d_normed = input_gradient(d_gates, gate_up)
        d_y, small, d_gain, normed = norm.gradients(d_normed, y, factor, gain, d_out, sites.mlp_in, sites.d_attention)
        d_attention: Operand = d_y if small is None else small
        d_gate_up = weight_gradient(d_gates, normed)
        if ctx.in_epilogue:
            d_gate_up = gated.apart(d_gate_up)
        d_mixed = input_gradient(d_attention, out)
        return d_mixed, d_y, weight_gradient(d_attention, mixed), d_gain, d_gate_up, d_down, None, None, None, None


class Norm(torch.autograd.Function):
    """The norm (N, D) of x (N, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        _, normed, factor = norm.normed(x, None, gain, eps, None)
        assert isinstance(normed, Tensor)
        ctx.save_for_backward(x, gain, factor)
        return normed

    @staticmethod
    def backward(ctx: Any, d_normed: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, factor = ctx.saved_tensors
        d, _, d_gain, _ = norm.gradients(d_normed.contiguous(), x, factor, gain, None, None, None)
        return d, d_gain, None
