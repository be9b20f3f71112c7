"""Matrices over float32 weights, and the copies in fewer bits that multiply activations in their place.

Letters: N tokens, D inputs, E outputs. Why copies and not casts: docs/decisions/0005-fast-step.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minifoundation.model.kernels import gated
from minifoundation.model.kernels.language import runs_on
from minifoundation.model.kernels.quantise import E4M3, Rounded, Site, launch_rounded, plain_rounded

Operand = Tensor | Rounded
"""A factor of a product: in full or half precision, or in 8 bits in the layouts that its products need."""


class Matrix(nn.Module):
    """A linear map without bias; the float32 weight, (E, D), is what is trained and saved.

    Args:
        dtype: of the activations. In half precision a copy of the weight in it multiplies them, kept from step to step by ``refresh``.
        small: another copy is in 8 bits, in both layouts, with a scale of its own.
        half: whether the copy in half precision is needed beside it.
        interleaved: the copy's rows are those of the weight's upper and lower half in turn.
    """

    copy: Tensor | None
    rows: Tensor | None
    columns: Tensor | None
    scale: Tensor | None

    def __init__(
        self, d_in: int, d_out: int, dtype: torch.dtype, *, small: bool = False, half: bool = True, interleaved: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        copied = dtype.itemsize < 4 and half
        self.register_buffer("copy", torch.empty(d_out, d_in, dtype=dtype) if copied else None, persistent=False)
        self.register_buffer("rows", torch.empty(d_out, d_in, dtype=E4M3) if small else None, persistent=False)
        self.register_buffer("columns", torch.empty(d_in, d_out, dtype=E4M3) if small else None, persistent=False)
        self.register_buffer("scale", torch.empty(2, 4) if small else None, persistent=False)
        self.interleaved = interleaved
        self.copied_version: int | None = None

    @property
    def small(self) -> Rounded:
        """The copy in 8 bits."""
        assert self.scale is not None
        return Rounded(self.rows, self.columns, self.scale[1, :1])

    @property
    def operand(self) -> Operand:
        """What multiplies in place of the weight."""
        if self.rows is not None:
            return self.small
        return self.weight if self.copy is None else self.copy

    @property
    def is_copied(self) -> bool:
        """Whether nothing but the copy in half precision is made of the weight."""
        return self.copy is not None and self.rows is None

    def new_rows(self) -> Tensor:
        """Return where the weight's rows are to be written in half precision, (E, D), for ``take``."""
        assert self.copy is not None
        return torch.empty_like(self.copy) if self.interleaved else self.copy

    def take(self, rows: Tensor) -> None:
        """Make the copy of ``rows``, from ``new_rows``, instead of the weight, which ``refresh`` then leaves alone until it changes."""
        if self.interleaved:
            self.interleave(rows)
        self.copied_version = self.weight._version

    def interleave(self, rows: Tensor) -> None:
        """Make the copy of ``rows``, those of the weight's upper and lower half in turn, in one pass."""
        assert self.copy is not None
        by_turns = gated.interleaved(rows)
        self.copy.view(by_turns.shape).copy_(by_turns)

    def forward(self, x: Tensor) -> Tensor:
        if self.copy is None:
            return F.linear(x, self.weight.to(x.dtype))
        result: Tensor = _Product.apply(x, self.weight, self.copy)  # type: ignore[no-untyped-call]
        return result


@torch.no_grad()
def refresh(matrices: Iterable[Matrix]) -> None:
    """Copy again the weights that have changed since they were copied.

    A change is seen by autograd's version of the weight, so none can be forgotten: a step, a loaded state, initial values.
    """
    changed = [m for m in matrices if m.copied_version != m.weight._version and (m.copy is not None or m.rows is not None)]
    copied = [m for m in changed if m.copy is not None]
    in_order = [m for m in copied if not m.interleaved]
    if in_order:
        torch._foreach_copy_([m.copy for m in in_order if m.copy is not None], [m.weight for m in in_order])
    for m in copied:
        if m.interleaved:
            m.interleave(m.weight)
    small = [m for m in changed if m.rows is not None]
    if small:
        largest = torch.stack(torch._foreach_norm([m.weight for m in small], float("inf")))
        limit = torch.finfo(E4M3).max
        # A power of two, so that multiplying by it rounds nothing.
        scales = torch.exp2(torch.floor(torch.log2(limit / largest.clamp(min=2.0**-60))))
        for m, scale in zip(small, scales, strict=True):
            assert m.scale is not None
            m.scale[0], m.scale[1] = scale, 1 / scale
            site = Site(E4M3, m.scale[0, :1], m.scale[1, :1], m.scale[0], watched=False)
            into = m.small
            if runs_on(m.weight):
                launch_rounded(m.weight, site, into)
            else:
                plain = plain_rounded(m.weight, site)
                for place, value in zip(into[:2], plain[:2], strict=True):
                    assert place is not None and value is not None
                    place.copy_(value)
    for matrix in changed:
        matrix.copied_version = matrix.weight._version


def product(x: Operand, weight: Operand) -> Tensor:
    """Return x weight^T, (N, E), of x (N, D) and weight (E, D); in half precision when both are in 8 bits."""
    if isinstance(x, Rounded) and isinstance(weight, Rounded):
        return small_product(x.rows, weight.rows, x.inverse, weight.inverse)
    assert isinstance(x, Tensor) and isinstance(weight, Tensor)
    return x @ weight.T


def input_gradient(d_out: Operand, weight: Operand) -> Tensor:
    """Return d_out weight, (N, D), of d_out (N, E) and weight (E, D)."""
    if isinstance(d_out, Rounded) and isinstance(weight, Rounded):
        return small_product(d_out.rows, weight.columns, d_out.inverse, weight.inverse)
    assert isinstance(d_out, Tensor) and isinstance(weight, Tensor)
    return d_out @ weight


def weight_gradient(d_out: Operand, x: Operand, before: Tensor | None = None) -> Tensor:
    """Return d_out^T x, (E, D) float32, of d_out (N, E) and x (N, D): not rounded to the dtype of the factors.

    Args:
        before: the gradient of earlier tokens, to which that of these is added in place.
    """
    if isinstance(d_out, Rounded) and isinstance(x, Rounded):
        small = small_product(d_out.columns, x.columns, d_out.inverse, x.inverse, dtype=torch.float32)
        return small if before is None else before.add_(small)
    assert isinstance(d_out, Tensor) and isinstance(x, Tensor)
    if before is not None:
        return add_product(before, d_out.T, x)
    result: Tensor = full_weight_gradient(d_out, x)
    return result


def add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool = False) -> Tensor:
    """Return ``total`` with left right added in place (or set to it when ``first``), not rounded to the dtype of the factors."""
    if left.is_cuda and left.dtype != total.dtype:
        if first:
            torch.ops.aten.mm.dtype_out(left, right, total.dtype, out=total)
        else:
            torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        torch.addmm(total, left.to(total.dtype), right.to(total.dtype), beta=0 if first else 1, out=total)
    return total


def small_product(
    left: Tensor | None,
    right: Tensor | None,
    left_inverse: Tensor,
    right_inverse: Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
) -> Tensor:
    """Return left right^T of 8-bit values, each along its contiguous dimension, times both inverses.

    Sums are promoted to float32 on the way: the tensor cores' own have about 14 bits (arXiv:2412.19437, section 3.3.2), and not to promote
    them saves 1 to 5% of a product (docs/speed.md).
    """
    assert left is not None and right is not None
    if left.is_cuda:
        extra = {} if out is None else {"out": out}
        result: Tensor = torch._scaled_mm(left, right.T, left_inverse, right_inverse, out_dtype=dtype, use_fast_accum=False, **extra)
        return result
    exact = (left.float() @ right.float().T) * (left_inverse * right_inverse)
    into = torch.empty(exact.shape, dtype=dtype, device=exact.device) if out is None else out
    into.copy_(exact)
    return into


@torch.library.custom_op("minifoundation::weight_gradient", mutates_args=())
def full_weight_gradient(d_out: Tensor, x: Tensor) -> Tensor:
    """Return d_out^T x, (E, D) float32 at least."""
    if d_out.is_cuda and d_out.dtype.itemsize == 2:
        return torch.mm(d_out.T, x, out_dtype=torch.float32)
    wide = torch.promote_types(d_out.dtype, torch.float32)
    return torch.mm(d_out.T.to(wide), x.to(wide))


@full_weight_gradient.register_fake
def _(d_out: Tensor, x: Tensor) -> Tensor:
    return d_out.new_empty(d_out.shape[1], x.shape[1], dtype=torch.promote_types(d_out.dtype, torch.float32))


class _Product(torch.autograd.Function):
    """x copy^T; the weight takes the gradient of its copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.save_for_backward(x, copy)
        return F.linear(x, copy)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        x, copy = ctx.saved_tensors
        return d_out @ copy, full_weight_gradient(d_out.flatten(0, -2), x.flatten(0, -2)), None
