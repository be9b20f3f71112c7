"""Rounding to 8-bit floats (arXiv:2209.05433) in the two layouts that products need, with the scale known beforehand.

Letters: N tokens, F features. *Rows* are (N, F), *columns* their transpose (F, N): Hopper multiplies 8-bit matrices only along their
contiguous dimension, and the gradient of a weight contracts over tokens. Where a kernel makes what is rounded, it rounds it itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from minifoundation.model.kernels.language import INSTALLED, INTERPRETED, jit, runs_on, tl

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SLOTS = 16
"""Places a site's largest value is gathered in, so that programs do not queue for one."""
TOKENS, BLOCK = 64, 128
"""Tile; a transposed store writes its tokens in one piece."""


def _assembly(format: str) -> Any:
    convert = f"cvt.rn.satfinite.{format}x2.f32"
    text = f"{{ .reg .b16 low, high; {convert} low, $2, $1; {convert} high, $4, $3; mov.b32 $0, {{low, high}}; }}"
    return tl.constexpr(text) if INSTALLED else None


ASSEMBLY_E4M3, ASSEMBLY_E5M2 = _assembly("e4m3"), _assembly("e5m2")


class Site(NamedTuple):
    """A tensor that is rounded at one place of the model, and what is known of its size."""

    dtype: torch.dtype
    scale: Tensor
    """(1,) float32: multiplies values before they are rounded."""
    inverse: Tensor
    """1 / scale."""
    largest: Tensor
    """(SLOTS,) float32: raised to the largest magnitude that is met, when ``watched``."""
    watched: bool

    @property
    def limit(self) -> float:
        """The largest magnitude of the format; larger values are rounded to it."""
        return torch.finfo(self.dtype).max


class Rounded(NamedTuple):
    """8-bit values, of a multiple of 4 tokens, that stand for ``values * inverse``; a layout that is not asked for is None."""

    rows: Tensor | None
    columns: Tensor | None
    inverse: Tensor


def plain_rounded(values: Tensor, site: Site, *, rows: bool = True, columns: bool = True) -> Rounded:
    """Return ``values`` (N, F) rounded: scaled in float32, cut off at the format's limit, rounded to nearest even."""
    wide = values.float()
    if site.watched:
        site.largest.copy_(torch.maximum(site.largest, wide.abs().max()))
    small = (wide * site.scale).clamp(-site.limit, site.limit).to(site.dtype)
    return Rounded(small if rows else None, small.T.contiguous() if columns else None, site.inverse)


def rounded(values: Tensor, site: Site, *, rows: bool = True, columns: bool = True) -> Rounded:
    """Return ``plain_rounded`` of contiguous ``values`` (N, F)."""
    if not runs_on(values):
        return plain_rounded(values, site, rows=rows, columns=columns)
    out = empty(values.shape, site, values.device, rows=rows, columns=columns)
    launch_rounded(values, site, out)
    return out


def empty(shape: torch.Size | tuple[int, int], site: Site, device: torch.device, *, rows: bool, columns: bool) -> Rounded:
    """Return uninitialised memory for the layouts asked for."""
    N, F = shape
    return Rounded(
        torch.empty(N, F, dtype=site.dtype, device=device) if rows else None,
        torch.empty(F, N, dtype=site.dtype, device=device) if columns else None,
        site.inverse,
    )


def launch_rounded(values: Tensor, site: Site, out: Rounded) -> None:
    """Write ``values`` to the layouts of ``out``."""
    N, F = values.shape
    grid = (-(-N // TOKENS), -(-F // BLOCK))
    _round[grid](values, *pointers(site, out), N, F, QUADS=TOKENS // 4, BLOCK=BLOCK, num_warps=4, **flags(site, out))


def pointers(site: Site, out: Rounded) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the arguments (rows, columns, scale, largest) of a kernel; in the place of a layout that is None the scale, not written."""
    return (
        site.scale if out.rows is None else out.rows,
        words(site.scale if out.columns is None else out.columns),
        site.scale,
        site.largest,
    )


def words(columns: Tensor) -> Tensor:
    """Return columns (F, N) as words of four tokens, (F, N/4)."""
    return columns.view(torch.int32)


def flags(site: Site, out: Rounded) -> dict[str, Any]:
    """Return the compile-time arguments that go with ``pointers``."""
    return {
        "E5": site.dtype == E5M2,
        "LIMIT": site.limit,
        "WATCHED": site.watched,
        "ROWS": out.rows is not None,
        "COLUMNS": out.columns is not None,
    }


@jit
def scaled(value, scale, LIMIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return float32 ``value`` scaled and cut off at the format's limit."""
    return tl.minimum(tl.maximum(value * scale, -LIMIT), LIMIT)


@jit
def small(value, E5: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return ``value`` in 8 bits."""
    return value.to(tl.float8e5 if E5 else tl.float8e4nv)


@jit
def word(a, b, c, d, E5: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return four values in 8 bits as one word, ``a`` in its lowest byte: columns are stored four tokens at a time.

    In assembly, since Triton (3.6) goes wrong where it moves single bytes about, in transposed tiles and in shifts alike; the GPU's tests
    compare every byte.
    """
    if INTERPRETED:
        return _byte(a, 0, E5) | _byte(b, 1, E5) | _byte(c, 2, E5) | _byte(d, 3, E5)
    return tl.inline_asm_elementwise(
        ASSEMBLY_E5M2 if E5 else ASSEMBLY_E4M3, "=r,f,f,f,f", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1
    )


@jit
def _byte(value, number, E5: tl.constexpr):  # type: ignore[no-untyped-def]
    return small(value, E5).to(tl.uint8, bitcast=True).to(tl.int32) << (8 * number)


@jit
def watch(value, largest, slot):  # type: ignore[no-untyped-def]
    """Raise a slot of ``largest`` to the largest magnitude of ``value``, whose masked entries are zero."""
    tl.atomic_max(largest + slot % 16, tl.max(tl.abs(value)), sem="relaxed")


@jit
def _round(  # type: ignore[no-untyped-def]
    values,
    rows,
    columns,
    scale,
    largest,
    N,
    F,
    QUADS: tl.constexpr,
    BLOCK: tl.constexpr,
    E5: tl.constexpr,
    LIMIT: tl.constexpr,
    WATCHED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    quad = tl.program_id(0) * QUADS + tl.arange(0, QUADS)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (quad < N // 4)[:, None] & (feature < F)[None, :]
    place = quad[:, None].to(tl.int64) * 4 * F + feature[None, :]
    factor = tl.load(scale)
    a = tl.load(values + place, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(values + place + F, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(values + place + 2 * F, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(values + place + 3 * F, mask=inside, other=0.0).to(tl.float32)
    if WATCHED:
        watch(tl.maximum(tl.maximum(tl.abs(a), tl.abs(b)), tl.maximum(tl.abs(c), tl.abs(d))), largest, tl.program_id(0) + tl.program_id(1))
    a, b, c, d = scaled(a, factor, LIMIT), scaled(b, factor, LIMIT), scaled(c, factor, LIMIT), scaled(d, factor, LIMIT)
    if ROWS:
        tl.store(rows + place, small(a, E5), mask=inside)
        tl.store(rows + place + F, small(b, E5), mask=inside)
        tl.store(rows + place + 2 * F, small(c, E5), mask=inside)
        tl.store(rows + place + 3 * F, small(d, E5), mask=inside)
    if COLUMNS:
        column = feature[:, None].to(tl.int64) * (N // 4) + quad[None, :]
        tl.store(columns + column, tl.trans(word(a, b, c, d, E5)), mask=tl.trans(inside))
