"""Rotation of queries and keys (arXiv:2104.09864) inside the merged projection, and back again.

Letters: N tokens, H query heads, K key/value heads, h head width. A token's heads lie side by side, (H + 2K) h wide: queries, keys,
values. Channel i is paired with i + h/2, as Hugging Face does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minifoundation.model.kernels.language import jit, runs_on, tl, triton
from minifoundation.model.kernels.quantise import E5M2, Rounded, Site, empty, flags, plain_rounded, pointers, scaled, small, watch, word

TOKENS = 64


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _of_tokens(table: Tensor, n_tokens: int) -> Tensor:
    """Return a table (R, h/2) of R positions, or of all tokens, as (N, 1, h/2)."""
    return table.repeat(n_tokens // len(table), 1)[:, None]


def plain_rotated_(heads: Tensor, cos: Tensor, sin: Tensor, n_turned: int) -> Tensor:
    """Return ``heads`` (N, heads, h) with the first ``n_turned`` rotated in place by tables (R, h/2), R a divisor of N."""
    heads[:, :n_turned] = _turned(heads[:, :n_turned], _of_tokens(cos, len(heads)), _of_tokens(sin, len(heads)))
    return heads


def plain_merged(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient of heads before the rotation, (N, (H + 2K) h), of d_q (N, H, h), d_k and d_v (N, K, h) after it."""
    cos, sin = _of_tokens(cos, len(d_q)), _of_tokens(sin, len(d_q))
    return torch.cat((_turned(d_q, cos, -sin), _turned(d_k, cos, -sin), d_v), dim=1).flatten(1)


def rotated_(heads: Tensor, cos: Tensor, sin: Tensor, n_turned: int) -> Tensor:
    """Return ``plain_rotated_`` of contiguous ``heads``."""
    if not runs_on(heads):
        return plain_rotated_(heads, cos, sin, n_turned)
    launch_rotated_(heads, cos, sin, n_turned)
    return heads


def merged(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor, site: Site | None) -> Tensor | Rounded:
    """Return ``plain_merged`` of contiguous gradients, rounded where a site is given."""
    if not runs_on(d_q):
        d = plain_merged(d_q, d_k, d_v, cos, sin)
        return d if site is None else plain_rounded(d, site)
    N, H, h = d_q.shape
    shape = N, (H + 2 * d_k.shape[1]) * h
    out = d_q.new_empty(shape) if site is None else empty(shape, site, d_q.device, rows=True, columns=True)
    launch_merged(d_q, d_k, d_v, cos, sin, out, site)
    return out


def launch_rotated_(heads: Tensor, cos: Tensor, sin: Tensor, n_turned: int) -> None:
    """Rotate in place."""
    N, n_heads, h = heads.shape
    width = int(triton.next_power_of_2(h // 2))
    _rotate[(-(-N // TOKENS), n_turned)](heads, cos, sin, N, n_heads * h, len(cos), HALF=h // 2, WIDTH=width, TOKENS=TOKENS, num_warps=4)


def launch_merged(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor, out: Tensor | Rounded, site: Site | None) -> None:
    """Write the merged gradient to ``out``."""
    N, H, h = d_q.shape
    K = d_k.shape[1]
    place = out if isinstance(out, Rounded) else Rounded(out, None, cos)
    site = site or Site(E5M2, cos, cos, cos, False)
    _merge[(-(-N // TOKENS), H + 2 * K)](
        d_q,
        d_k,
        d_v,
        cos,
        sin,
        *pointers(site, place),
        N,
        len(cos),
        H,
        K,
        HALF=h // 2,
        WIDTH=triton.next_power_of_2(h),
        QUADS=TOKENS // 4,
        num_warps=4,
        **flags(site, place),
    )


@jit
def _rotate(heads, cos, sin, N, width, R, HALF: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, WIDTH)
    inside = (token < N)[:, None] & (channel < HALF)[None, :]
    place = token[:, None].to(tl.int64) * width + tl.program_id(1) * 2 * HALF + channel[None, :]
    angle = (token % R)[:, None] * HALF + channel[None, :]
    c, s = tl.load(cos + angle, mask=inside), tl.load(sin + angle, mask=inside)
    first, second = tl.load(heads + place, mask=inside).to(tl.float32), tl.load(heads + place + HALF, mask=inside).to(tl.float32)
    tl.store(heads + place, (first * c - second * s).to(heads.dtype.element_ty), mask=inside)
    tl.store(heads + place + HALF, (second * c + first * s).to(heads.dtype.element_ty), mask=inside)


@jit
def _merge(  # type: ignore[no-untyped-def]
    d_q,
    d_k,
    d_v,
    cos,
    sin,
    rows,
    columns,
    scale,
    largest,
    N,
    R,
    H,
    K,
    HALF: tl.constexpr,
    WIDTH: tl.constexpr,
    QUADS: tl.constexpr,
    E5: tl.constexpr,
    LIMIT: tl.constexpr,
    WATCHED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    head = tl.program_id(1)
    quad = tl.program_id(0) * QUADS + tl.arange(0, QUADS)
    channel = tl.arange(0, WIDTH)
    if head < H:
        base, n_heads, number = d_q, H, head
    elif head < H + K:
        base, n_heads, number = d_k, K, head - H
    else:
        base, n_heads, number = d_v, K, head - H - K
    turned = head < H + K
    a = _unturned(base, n_heads, number, cos, sin, quad * 4, channel, N, R, turned, HALF)
    b = _unturned(base, n_heads, number, cos, sin, quad * 4 + 1, channel, N, R, turned, HALF)
    c = _unturned(base, n_heads, number, cos, sin, quad * 4 + 2, channel, N, R, turned, HALF)
    d = _unturned(base, n_heads, number, cos, sin, quad * 4 + 3, channel, N, R, turned, HALF)
    width = (H + 2 * K) * 2 * HALF
    feature = head * 2 * HALF + channel
    place = quad[:, None].to(tl.int64) * 4 * width + feature[None, :]
    here = (channel < 2 * HALF)[None, :]
    if COLUMNS:
        whole = (quad < N // 4)[:, None] & here
        if WATCHED:
            watch(tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d))), largest, tl.program_id(0) + head)
        factor = tl.load(scale)
        a, b, c, d = scaled(a, factor, LIMIT), scaled(b, factor, LIMIT), scaled(c, factor, LIMIT), scaled(d, factor, LIMIT)
        tl.store(rows + place, small(a, E5), mask=whole)
        tl.store(rows + place + width, small(b, E5), mask=whole)
        tl.store(rows + place + 2 * width, small(c, E5), mask=whole)
        tl.store(rows + place + 3 * width, small(d, E5), mask=whole)
        column = feature[:, None].to(tl.int64) * (N // 4) + quad[None, :]
        tl.store(columns + column, tl.trans(word(a, b, c, d, E5)), mask=tl.trans(whole))
    else:
        half = rows.dtype.element_ty
        tl.store(rows + place, a.to(half), mask=here & (quad * 4 < N)[:, None])
        tl.store(rows + place + width, b.to(half), mask=here & (quad * 4 + 1 < N)[:, None])
        tl.store(rows + place + 2 * width, c.to(half), mask=here & (quad * 4 + 2 < N)[:, None])
        tl.store(rows + place + 3 * width, d.to(half), mask=here & (quad * 4 + 3 < N)[:, None])


@jit
def _unturned(base, n_heads, number, cos, sin, token, channel, N, R, turned, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the gradient of a head before its rotation, float32, of one token in four."""
    inside = (token < N)[:, None] & (channel < 2 * HALF)[None, :]
    place = (token[:, None].to(tl.int64) * n_heads + number) * 2 * HALF + channel[None, :]
    value = tl.load(base + place, mask=inside, other=0.0).to(tl.float32)
    if turned:
        partner = tl.where(channel < HALF, HALF, -HALF)[None, :]
        other = tl.load(base + place + partner, mask=inside, other=0.0).to(tl.float32)
        angle = (token % R)[:, None] * HALF + (channel % HALF)[None, :]
        c, s = tl.load(cos + angle, mask=inside, other=0.0), tl.load(sin + angle, mask=inside, other=0.0)
        value = value * c + tl.where(channel < HALF, 1.0, -1.0)[None, :] * other * s
        value = value.to(base.dtype.element_ty).to(tl.float32)
    return value
