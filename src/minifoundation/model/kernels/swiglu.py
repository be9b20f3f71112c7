"""The product of SwiGLU (arXiv:2002.05202) and its gradients, each in one pass over memory.

Letters: N tokens, F feed-forward width. Gate and up are the halves of one matrix (N, 2F), as one product makes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minifoundation.model.kernels.language import jit, runs_on, tl
from minifoundation.model.kernels.quantise import Rounded, Site, empty, flags, plain_rounded, pointers, scaled, small, watch, word, words

COLUMNS = 2048  # with 256 threads 16 bytes a load
TOKENS, BLOCK, WARPS = 32, 128, 4
"""Tile of the backward where it rounds, and its warps."""


def plain_product(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, (N, F), computed in float32 at least and rounded once."""
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


def product(gate_up: Tensor, site: Site | None = None) -> Tensor | Rounded:
    """Return ``plain_product``, rounded in rows where a site is given."""
    if not runs_on(gate_up):
        out = plain_product(gate_up)
        return out if site is None else plain_rounded(out, site, columns=False)
    N, F = len(gate_up), gate_up.shape[1] // 2
    into = gate_up.new_empty(N, F) if site is None else empty((N, F), site, gate_up.device, rows=True, columns=False)
    launch_product(gate_up, into, site)
    return into


def gradients(
    gate_up: Tensor, d_product: Tensor, site: Site | None = None, d_site: Site | None = None
) -> tuple[Tensor | Rounded, Tensor | Rounded]:
    """Return ``plain_gradients``; with sites the first rounded to ``d_site`` and the product to ``site``, in columns."""
    if not runs_on(gate_up):
        d, again = plain_gradients(gate_up, d_product)
        if site is None or d_site is None:
            return d, again
        return plain_rounded(d, d_site), plain_rounded(again, site._replace(watched=False), rows=False)
    if site is None or d_site is None:
        d_gate_up, again = torch.empty_like(gate_up), torch.empty_like(d_product)
        launch_gradients(gate_up, d_product, d_gate_up, again)
        return d_gate_up, again
    rounded = empty(gate_up.shape, d_site, gate_up.device, rows=True, columns=True)
    columns = empty(d_product.shape, site, gate_up.device, rows=False, columns=True)
    launch_rounded_gradients(gate_up, d_product, rounded, columns, site, d_site)
    return rounded, columns


def launch_product(gate_up: Tensor, into: Tensor | Rounded, site: Site | None) -> None:
    """Write the product to ``into``; all contiguous."""
    N, F = len(gate_up), gate_up.shape[1] // 2
    place = into.rows if isinstance(into, Rounded) else into
    scale, largest = (gate_up, gate_up) if site is None else (site.scale, site.largest)
    watched, limit = (False, 0.0) if site is None else (site.watched, site.limit)
    _product[(N, -(-F // COLUMNS))](
        gate_up, place, scale, largest, F, COLUMNS=COLUMNS, SMALL=site is not None, WATCHED=watched, LIMIT=limit, num_warps=8
    )


def launch_gradients(gate_up: Tensor, d_product: Tensor, d_gate_up: Tensor, again: Tensor) -> None:
    """Write the gradient of ``gate_up`` and the product; all contiguous."""
    N, F = d_product.shape
    _gradients[(N, -(-F // COLUMNS))](gate_up, d_product, d_gate_up, again, F, COLUMNS=COLUMNS, num_warps=8)


def launch_rounded_gradients(gate_up: Tensor, d_product: Tensor, rounded: Rounded, again: Rounded, site: Site, d_site: Site) -> None:
    """Write the rounded gradient of ``gate_up`` in both layouts and the rounded product in columns; all contiguous."""
    N, F = d_product.shape
    assert again.columns is not None
    _rounded_gradients[(-(-N // TOKENS), -(-F // BLOCK))](
        gate_up,
        d_product,
        *pointers(d_site, rounded),
        words(again.columns),
        site.scale,
        N,
        F,
        QUADS=TOKENS // 4,
        BLOCK=BLOCK,
        AGAIN_LIMIT=site.limit,
        num_warps=WARPS,
        **flags(d_site, rounded),
    )


@jit
def _product(  # type: ignore[no-untyped-def]
    gate_up, out, scale, largest, F, COLUMNS: tl.constexpr, SMALL: tl.constexpr, WATCHED: tl.constexpr, LIMIT: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < F
    gate = tl.load(gate_up + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up
    if SMALL:
        value = value.to(gate_up.dtype.element_ty).to(tl.float32)
        if WATCHED:
            watch(value, largest, tl.program_id(0))
        tl.store(out + row * F + column, small(scaled(value, tl.load(scale), LIMIT), False), mask=inside)
    else:
        tl.store(out + row * F + column, value.to(out.dtype.element_ty), mask=inside)


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


@jit
def _rounded_gradients(  # type: ignore[no-untyped-def]
    gate_up,
    d_product,
    rows,
    columns,
    scale,
    largest,
    again,
    again_scale,
    N,
    F,
    QUADS: tl.constexpr,
    BLOCK: tl.constexpr,
    AGAIN_LIMIT: tl.constexpr,
    E5: tl.constexpr,
    LIMIT: tl.constexpr,
    WATCHED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    quad = tl.program_id(0) * QUADS + tl.arange(0, QUADS)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (quad < N // 4)[:, None] & (feature < F)[None, :]
    factor, again_factor = tl.load(scale), tl.load(again_scale)
    token = quad[:, None].to(tl.int64) * 4
    gate0, up0, product0, most0 = _of_token(
        gate_up, d_product, rows, token, feature, F, inside, factor, again_factor, E5, LIMIT, AGAIN_LIMIT
    )
    gate1, up1, product1, most1 = _of_token(
        gate_up, d_product, rows, token + 1, feature, F, inside, factor, again_factor, E5, LIMIT, AGAIN_LIMIT
    )
    gate2, up2, product2, most2 = _of_token(
        gate_up, d_product, rows, token + 2, feature, F, inside, factor, again_factor, E5, LIMIT, AGAIN_LIMIT
    )
    gate3, up3, product3, most3 = _of_token(
        gate_up, d_product, rows, token + 3, feature, F, inside, factor, again_factor, E5, LIMIT, AGAIN_LIMIT
    )
    column = feature[:, None].to(tl.int64) * (N // 4) + quad[None, :]
    there = tl.trans(inside)
    tl.store(columns + column, tl.trans(word(gate0, gate1, gate2, gate3, E5)), mask=there)
    tl.store(columns + column + F.to(tl.int64) * (N // 4), tl.trans(word(up0, up1, up2, up3, E5)), mask=there)
    tl.store(again + column, tl.trans(word(product0, product1, product2, product3, False)), mask=there)
    if WATCHED:
        watch(tl.maximum(tl.maximum(most0, most1), tl.maximum(most2, most3)), largest, tl.program_id(0) + tl.program_id(1))


@jit
def _of_token(  # type: ignore[no-untyped-def]
    gate_up,
    d_product,
    rows,
    token,
    feature,
    F,
    inside,
    factor,
    again_factor,
    E5: tl.constexpr,
    LIMIT: tl.constexpr,
    AGAIN_LIMIT: tl.constexpr,
):
    """Store the rounded gradients of one token in four; return them and the product, scaled, and the larger gradient's magnitude."""
    place = token * 2 * F + feature[None, :]
    half = gate_up.dtype.element_ty
    gate = tl.load(gate_up + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + place + F, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(d_product + token * F + feature[None, :], mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    d_gate = (d * up * s * (1 + gate * (1 - s))).to(half).to(tl.float32)
    d_up = (d * gate * s).to(half).to(tl.float32)
    most = tl.maximum(tl.abs(d_gate), tl.abs(d_up))
    d_gate, d_up = scaled(d_gate, factor, LIMIT), scaled(d_up, factor, LIMIT)
    tl.store(rows + place, small(d_gate, E5), mask=inside)
    tl.store(rows + place + F, small(d_up, E5), mask=inside)
    return d_gate, d_up, scaled((gate * s * up).to(half).to(tl.float32), again_factor, AGAIN_LIMIT), most
