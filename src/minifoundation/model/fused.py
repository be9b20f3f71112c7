"""A block by hand: two functions around attention, each product's neighbours done in one pass over memory, backward included.

They compute what ``Block.branches`` does, which is their definition and runs elsewhere, and serve half precision and 8 bits alike: an
operand of a product is a tensor, or rounded by the kernel that makes it. Normed values and SwiGLU's product are not kept: the backward's
kernels make them again from what they read anyway.

Letters: B rows, T tokens a row, N = B T, D model width, H query heads, K key/value heads, h head width, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minifoundation.model.fp8 import Sites
from minifoundation.model.kernels import gated, norm, quantise, rope, swiglu
from minifoundation.model.kernels.quantise import Rounded, Site
from minifoundation.model.matrix import Operand, input_gradient, product, weight_gradient
from minifoundation.model.size import GATES_AT_ONCE


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
        *heads, factor = _heads(x, gain, operand, eps, tables, shape, sites)
        h = shape[-1]
        cos, sin = tables or (torch.ones(1, h // 2, device=x.device), torch.zeros(1, h // 2, device=x.device))
        ctx.save_for_backward(x, gain, factor, cos, sin, *_kept(operand))
        ctx.sites = sites
        q, k, v = heads
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


def _heads(
    x: Tensor,
    gain: Tensor,
    operand: Operand,
    eps: float,
    tables: tuple[Tensor, Tensor] | None,
    shape: tuple[int, int, int, int, int],
    sites: Sites,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k and v as ``AttentionInputs`` does, views of one tensor, and 1 / rms(x), (N,) float32."""
    B, T, H, K, h = shape
    _, normed, factor = norm.normed(x, None, gain, eps, sites.attention_in)
    heads = product(normed, operand).view(-1, H + 2 * K, h)
    if tables is not None:
        rope.rotated_(heads, *tables, H + K)
    q, k, v = heads.view(B, T, H + 2 * K, h).split([H, K, K], dim=2)
    return q, k, v, factor


@torch.no_grad()
def heads_again(x: Tensor, gain: Tensor, operand: Operand, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of ``AttentionInputs`` for a backward; arguments as there, without the weight."""
    return _heads(x, gain, operand, *rest)[:3]


class HeadNorms(torch.autograd.Function):
    """QK-norm and rotation of q (B, T, H, h) and k (B, T, K, h); the steps between are made again in the backward, not kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, normed: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], *gains: Tensor) -> Any:
        ctx.save_for_backward(q, k)
        ctx.normed, ctx.gains = normed, gains
        return normed(q, k)

    @staticmethod
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor) -> tuple[Tensor | None, ...]:
        q, k = (kept.detach().requires_grad_() for kept in ctx.saved_tensors)
        with torch.enable_grad():
            outputs = ctx.normed(q, k)
        d_q, d_k, *d_gains = torch.autograd.grad(outputs, (q, k, *ctx.gains), (d_q, d_k))
        return d_q, d_k, None, *d_gains


class AfterAttention(torch.autograd.Function):
    """Output product, norm and SwiGLU with their residuals: x (N, D) and what attention mixed (N, H h) to the block's output (N, D).

    With ``in_epilogue`` SwiGLU is done by the products beside it (``kernels/gated.py``), which want gate and up interleaved: their operand
    is, or, with ``turn``, it is made so where it is used.
    With ``again`` nothing is kept but the inputs, and tokens are dealt with ``AT_ONCE`` at a time, so that the gates of a long row never
    exist in full: the backward makes them again, and leaves out the product after them, which it does not need.
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
        again: bool,
        turn: bool = False,
    ) -> Tensor:
        ctx.settings = settings = _Settings(operands, eps, sites, in_epilogue, turn)
        ctx.again = again
        if not again:
            hidden, activated = _gates(mixed, x, gain, settings)
            ctx.save_for_backward(gain, hidden.y, hidden.factor, hidden.gates, *_kept(hidden.mixed))
            return _output(hidden, activated, settings)
        ctx.save_for_backward(gain, mixed, x)
        return _joined([_output(*_gates(mixed[rows], x[rows], gain, settings), settings) for rows in _parts(len(x))])

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        settings: _Settings = ctx.settings
        d_out = d_out.contiguous()  # kernels read it by rows; the gradient of a sum is one number, spread
        if not ctx.again:
            gain, y, factor, gates, columns, other = ctx.saved_tensors
            hidden = _Hidden(_of(columns, other), y, factor, gates)
            d_mixed, d_x, *d_weights = _gradients(d_out, gain, hidden, settings, [])
        else:
            gain, mixed, x = ctx.saved_tensors
            d_parts, d_weights = [], []
            for rows in _parts(len(x)):
                hidden = _gates(mixed[rows], x[rows], gain, settings)[0]
                *d_part, d_out_weight, d_gain, d_gate_up, d_down = _gradients(d_out[rows], gain, hidden, settings, d_weights)
                d_weights = [d_out_weight, d_gain, d_gate_up, d_down]
                d_parts.append(d_part)
                del hidden  # the gates of the next part come before it would be replaced
            d_mixed, d_x = (_joined(list(part)) for part in zip(*d_parts, strict=True))
        d_out_weight, d_gain, d_gate_up, d_down = d_weights
        if settings.in_epilogue:
            d_gate_up = gated.apart(d_gate_up)
        return d_mixed, d_x, d_out_weight, d_gain, d_gate_up, d_down, None, None, None, None, None, None


AT_ONCE = GATES_AT_ONCE
"""Tokens of a long row whose gates exist at once: enough for products at their full rate."""


def _parts(tokens: int) -> list[slice]:
    return [slice(first, first + AT_ONCE) for first in range(0, tokens, AT_ONCE)]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Settings(NamedTuple):
    """What ``AfterAttention`` is given beside activations and weights."""

    operands: tuple[Operand, Operand, Operand]
    """In place of the weights: out, gate-up, down."""
    eps: float
    sites: Sites
    in_epilogue: bool
    turn: bool

    @property
    def gate_up(self) -> Operand:
        """The operand of gate and up, interleaved where its products want it."""
        operand = self.operands[1]
        if not self.turn:
            return operand
        assert isinstance(operand, Tensor)
        return gated.interleaved(operand).reshape(operand.shape)


class _Hidden(NamedTuple):
    """What ``AfterAttention``'s backward reads."""

    mixed: Operand
    y: Tensor
    """The residual stream between attention and SwiGLU, (N, D)."""
    factor: Tensor
    """1 / rms(y), (N,) float32."""
    gates: Tensor
    """Gate and up, (N, 2F)."""


def _gates(mixed: Tensor, x: Tensor, gain: Tensor, settings: _Settings) -> tuple[_Hidden, Tensor | None]:
    """Return what the backward reads, and SwiGLU's product where the epilogue of the gates has made it."""
    of_out, of_gate_up = settings.operands[0], settings.gate_up
    small = _operand(mixed, settings.sites.mixed)
    y, normed, factor = norm.normed(x, product(small, of_out), gain, settings.eps, settings.sites.mlp_in)
    if not settings.in_epilogue:
        return _Hidden(small, y, factor, product(normed, of_gate_up)), None
    assert isinstance(normed, Tensor) and isinstance(of_gate_up, Tensor)
    gates, activated = gated.product(normed, of_gate_up)
    return _Hidden(small, y, factor, gates), activated


def _output(hidden: _Hidden, activated: Tensor | None, settings: _Settings) -> Tensor:
    of_down = settings.operands[2]
    if activated is None:
        return product(swiglu.product(hidden.gates, settings.sites.product), of_down).add_(hidden.y)
    assert isinstance(of_down, Tensor)
    return gated.sum_with_product(hidden.y, activated, of_down)


def _gradients(
    d_out: Tensor, gain: Tensor, hidden: _Hidden, settings: _Settings, before: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of mixed, x, out, gain, the operand of gate-up, and down.

    Those of weights are added in place to the ones of the tokens ``before``.
    """
    sites = settings.sites
    out, gate_up, down = (_of(*_kept(operand)) for operand in (settings.operands[0], settings.gate_up, settings.operands[2]))
    before_out, before_gain, before_gate_up, before_down = before or (None, None, None, None)
    d_mlp = _operand(d_out, sites.d_mlp)
    d_gates: Operand
    activated: Operand
    if settings.in_epilogue:
        assert isinstance(d_mlp, Tensor) and isinstance(down, Tensor)
        d_gates, activated = gated.gradients(d_mlp, down, hidden.gates)
    else:
        d_gates, activated = swiglu.gradients(hidden.gates, input_gradient(d_mlp, down), sites.product, sites.d_gate_up)
    d_down = weight_gradient(d_mlp, activated, before_down)
    d_normed = input_gradient(d_gates, gate_up)
    d_y, small, d_gain, normed = norm.gradients(d_normed, hidden.y, hidden.factor, gain, d_out, sites.mlp_in, sites.d_attention)
    d_attention: Operand = d_y if small is None else small
    d_gate_up = weight_gradient(d_gates, normed, before_gate_up)
    d_gain = d_gain if before_gain is None else before_gain.add_(d_gain)
    d_mixed = input_gradient(d_attention, out)
    return d_mixed, d_y, weight_gradient(d_attention, hidden.mixed, before_out), d_gain, d_gate_up, d_down


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
