"""RMSNorm (arXiv:1910.07467) of a residual stream, with the addition before it and what comes after it in the same pass.

Letters: N tokens, D model width. Statistics in float32; scaled after the cast back, as Hugging Face does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minifoundation.model.kernels.language import jit, runs_on, tl, triton
from minifoundation.model.kernels.quantise import (
    E5M2,
    Rounded,
    Site,
    empty,
    launch_rounded,
    plain_rounded,
    scaled,
    small,
    watch,
    word,
    words,
)

EACH, WARPS = 16, 4
"""Tokens that a program of the backward goes through, one by one, while it sums up the gradient of the weight; and its warps."""
TOKENS, BLOCK = 64, 128
"""Tile of what is transposed."""


def plain_normed(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return y = x + branch (x itself without a branch), its norm scaled by ``weight``, both (N, D), and 1 / rms(y), (N,) float32."""
    y = x if branch is None else x + branch
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    factor = torch.rsqrt(wide.square().mean(-1) + eps)
    return y, weight.to(y.dtype) * (wide * factor[:, None]).to(y.dtype), factor


def plain_gradients(d_normed: Tensor, y: Tensor, factor: Tensor, weight: Tensor, d_y: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return d_y (if there is one) + the gradient through the norm (N, D), that of ``weight`` (D,) float32, and the normed values again."""
    wide = torch.promote_types(y.dtype, torch.float32)
    unit = y.to(wide) * factor[:, None]
    g = d_normed.to(wide)
    weighted = g * weight.to(wide)
    through = factor[:, None] * (weighted - unit * (weighted * unit).mean(-1, keepdim=True))
    d = through if d_y is None else d_y.to(wide) + through
    return d.to(y.dtype), (g * unit).sum(0), weight.to(y.dtype) * unit.to(y.dtype)


def normed(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, site: Site | None) -> tuple[Tensor, Tensor | Rounded, Tensor]:
    """Return ``plain_normed``; with a site the normed values are rounded, in rows alone."""
    if not runs_on(x):
        y, out, factor = plain_normed(x, branch, weight, eps)
        return y, out if site is None else plain_rounded(out, site, columns=False), factor
    y = x if branch is None else torch.empty_like(x)
    factor = torch.empty(len(x), device=x.device)
    into = torch.empty_like(x) if site is None else empty(x.shape, site, x.device, rows=True, columns=False)
    launch_normed(x, branch, weight, eps, y, into, factor, site)
    return y, into, factor


def gradients(
    d_normed: Tensor, y: Tensor, factor: Tensor, weight: Tensor, d_y: Tensor | None, site: Site | None, d_site: Site | None
) -> tuple[Tensor, Rounded | None, Tensor, Tensor | Rounded]:
    """Return ``plain_gradients``, the first also rounded to ``d_site`` where one is given; the last rounded to ``site``, in columns."""
    if not runs_on(y):
        d, d_weight, again = plain_gradients(d_normed, y, factor, weight, d_y)
        rounded = None if d_site is None else plain_rounded(d, d_site)
        unwatched = None if site is None else plain_rounded(again, site._replace(watched=False), rows=False)
        return d, rounded, d_weight, again if unwatched is None else unwatched
    d = torch.empty_like(y)
    rounded = None if d_site is None else empty(y.shape, d_site, y.device, rows=True, columns=True)
    normed_again = torch.empty_like(y) if site is None else None
    parts = torch.empty(-(-len(y) // EACH), y.shape[1], device=y.device)
    launch_gradients(d_normed, y, factor, weight, d_y, d, rounded, normed_again, parts, d_site)
    if rounded is not None and d_site is not None:
        launch_rounded(d, d_site._replace(watched=False), rounded._replace(rows=None))
    if site is None:
        assert normed_again is not None
        return d, rounded, parts.sum(0), normed_again
    columns = empty(y.shape, site, y.device, rows=False, columns=True)
    launch_columns(y, factor, weight, columns, site)
    return d, rounded, parts.sum(0), columns


def launch_normed(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, y: Tensor, into: Tensor | Rounded, factor: Tensor, site: Site | None
) -> None:
    """Write the sum to ``y``, the normed values to ``into`` and 1 / rms to ``factor``; all contiguous."""
    N, D = x.shape
    width = triton.next_power_of_2(D)
    place = into.rows if isinstance(into, Rounded) else into
    scale, largest = (factor, factor) if site is None else (site.scale, site.largest)
    _normed[(N,)](
        x,
        x if branch is None else branch,
        weight,
        y,
        place,
        factor,
        scale,
        largest,
        eps,
        D,
        WIDTH=width,
        BRANCH=branch is not None,
        SMALL=isinstance(into, Rounded),
        WATCHED=site is not None and site.watched,
        LIMIT=0.0 if site is None else site.limit,
        num_warps=min(8, max(1, width // 256)),
    )


def launch_gradients(
    d_normed: Tensor,
    y: Tensor,
    factor: Tensor,
    weight: Tensor,
    d_y: Tensor | None,
    d: Tensor,
    rounded: Rounded | None,
    again: Tensor | None,
    parts: Tensor,
    d_site: Site | None,
) -> None:
    """Write the gradients of y, the weight's in ``parts`` that are yet to be summed, and the normed values; ``rounded`` in rows alone."""
    N, D = y.shape
    rows, scale, largest = (d, factor, factor) if rounded is None or d_site is None else (rounded.rows, d_site.scale, d_site.largest)
    _norm_gradients[(len(parts),)](
        d_normed,
        y,
        factor,
        weight,
        d if d_y is None else d_y,
        d,
        rows,
        scale,
        largest,
        d if again is None else again,
        parts,
        N,
        D,
        EACH=EACH,
        WIDTH=triton.next_power_of_2(D),
        RESIDUAL=d_y is not None,
        ROWS=d_site is not None,
        AGAIN=again is not None,
        WATCHED=d_site is not None and d_site.watched,
        E5=d_site is not None and d_site.dtype == E5M2,
        LIMIT=0.0 if d_site is None else d_site.limit,
        num_warps=WARPS,
    )


def launch_columns(y: Tensor, factor: Tensor, weight: Tensor, out: Rounded, site: Site) -> None:
    """Write the normed values, made again from y and 1 / rms, to the columns of ``out``."""
    N, D = y.shape
    assert out.columns is not None
    grid = (-(-N // TOKENS), -(-D // BLOCK))
    _columns[grid](y, factor, weight, words(out.columns), site.scale, N, D, QUADS=TOKENS // 4, BLOCK=BLOCK, LIMIT=site.limit, num_warps=4)


@jit
def _normed(  # type: ignore[no-untyped-def]
    x,
    branch,
    weight,
    y,
    into,
    factor,
    scale,
    largest,
    eps,
    D,
    WIDTH: tl.constexpr,
    BRANCH: tl.constexpr,
    SMALL: tl.constexpr,
    WATCHED: tl.constexpr,
    LIMIT: tl.constexpr,
):
    token = tl.program_id(0)
    feature = tl.arange(0, WIDTH)
    inside = feature < D
    place = token.to(tl.int64) * D + feature
    total = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if BRANCH:
        total = (total + tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)).to(y.dtype.element_ty)
        tl.store(y + place, total, mask=inside)
        total = total.to(tl.float32)
    one_over = 1 / tl.sqrt(tl.sum(total * total) / D + eps)
    tl.store(factor + token, one_over)
    half = y.dtype.element_ty
    gain = tl.load(weight + feature, mask=inside, other=0.0).to(half).to(tl.float32)
    out = (gain * (total * one_over).to(half).to(tl.float32)).to(half)
    if SMALL:
        wide = out.to(tl.float32)
        if WATCHED:
            watch(wide, largest, token)
        out = small(scaled(wide, tl.load(scale), LIMIT), False)
    tl.store(into + place, out, mask=inside)


@jit
def _norm_gradients(  # type: ignore[no-untyped-def]
    d_normed,
    y,
    factor,
    weight,
    d_y,
    d,
    rows,
    scale,
    largest,
    again,
    parts,
    N,
    D,
    EACH: tl.constexpr,
    WIDTH: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    AGAIN: tl.constexpr,
    WATCHED: tl.constexpr,
    E5: tl.constexpr,
    LIMIT: tl.constexpr,
):
    feature = tl.arange(0, WIDTH)
    there = feature < D
    half = y.dtype.element_ty
    weights = tl.load(weight + feature, mask=there, other=0.0)
    of_weight = tl.zeros((WIDTH,), tl.float32)
    most = tl.zeros((WIDTH,), tl.float32)
    for number in range(EACH):
        token = tl.program_id(0) * EACH + number
        inside = there & (token < N)
        place = token.to(tl.int64) * D + feature
        over = tl.load(factor + token, mask=token < N, other=0.0)
        unit = tl.load(y + place, mask=inside, other=0.0).to(tl.float32) * over
        g = tl.load(d_normed + place, mask=inside, other=0.0).to(tl.float32)
        of_weight += g * unit
        g *= weights.to(tl.float32)
        total = over * (g - unit * (tl.sum(g * unit) / D))
        if RESIDUAL:
            total += tl.load(d_y + place, mask=inside, other=0.0).to(tl.float32)
        out = total.to(half)
        tl.store(d + place, out, mask=inside)
        if ROWS:
            wide = tl.where(inside, out.to(tl.float32), 0.0)
            most = tl.maximum(most, tl.abs(wide))
            tl.store(rows + place, small(scaled(wide, tl.load(scale), LIMIT), E5), mask=inside)
        if AGAIN:
            tl.store(again + place, (weights.to(half).to(tl.float32) * unit.to(half).to(tl.float32)).to(half), mask=inside)
    tl.store(parts + tl.program_id(0) * D + feature, of_weight, mask=there)
    if WATCHED:
        watch(most, largest, tl.program_id(0))


@jit
def _columns(y, factor, weight, columns, scale, N, D, QUADS: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr):  # type: ignore[no-untyped-def]
    quad = tl.program_id(0) * QUADS + tl.arange(0, QUADS)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gain = tl.load(weight + feature, mask=feature < D, other=0.0).to(y.dtype.element_ty).to(tl.float32)[None, :]
    times = tl.load(scale)
    a = scaled(_again(y, factor, gain, quad * 4, feature, N, D), times, LIMIT)
    b = scaled(_again(y, factor, gain, quad * 4 + 1, feature, N, D), times, LIMIT)
    c = scaled(_again(y, factor, gain, quad * 4 + 2, feature, N, D), times, LIMIT)
    d = scaled(_again(y, factor, gain, quad * 4 + 3, feature, N, D), times, LIMIT)
    column = feature[:, None].to(tl.int64) * (N // 4) + quad[None, :]
    inside = (quad < N // 4)[None, :] & (feature < D)[:, None]
    tl.store(columns + column, tl.trans(word(a, b, c, d, False)), mask=inside)


@jit
def _again(y, factor, gain, token, feature, N, D):  # type: ignore[no-untyped-def]
    """Return the normed values of one token in four as the forward rounded them to half precision, in float32."""
    half = y.dtype.element_ty
    inside = (token < N)[:, None] & (feature < D)[None, :]
    over = tl.load(factor + token, mask=token < N, other=0.0)[:, None]
    unit = tl.load(y + token[:, None].to(tl.int64) * D + feature[None, :], mask=inside, other=0.0).to(tl.float32) * over
    return (gain * unit.to(half).to(tl.float32)).to(half).to(tl.float32)
