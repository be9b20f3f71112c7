"""Matrices over float32 weights, and the half-precision copies that multiply activations in their place.

Letters: N tokens, D inputs, E outputs. Why copies and not casts: docs/decisions/0005-fast-step.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Matrix(nn.Module):
    """A linear map without bias; the float32 weight, (E, D), is what is trained and saved.

    Args:
        dtype: of the activations. In half precision a copy of the weight in it multiplies them, kept from step to step by ``refresh``.
    """

    copy: Tensor | None

    def __init__(self, d_in: int, d_out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        copy = torch.empty(d_out, d_in, dtype=dtype) if dtype.itemsize < 4 else None
        self.register_buffer("copy", copy, persistent=False)
        self.copied_version: int | None = None

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
    changed = [m for m in matrices if m.copy is not None and m.copied_version != m.weight._version]
    if changed:
        torch._foreach_copy_([m.copy for m in changed if m.copy is not None], [m.weight for m in changed])
    for matrix in changed:
        matrix.copied_version = matrix.weight._version


@torch.library.custom_op("minifoundation::weight_gradient", mutates_args=())
def weight_gradient(d_out: Tensor, x: Tensor) -> Tensor:
    """Return d_out^T x, (E, D) float32, of d_out (N, E) and x (N, D): not rounded to the dtype of the factors."""
    if d_out.is_cuda and d_out.dtype != torch.float32:
        return torch.mm(d_out.T, x, out_dtype=torch.float32)
    return torch.mm(d_out.T.float(), x.float())


@weight_gradient.register_fake
def _(d_out: Tensor, x: Tensor) -> Tensor:
    return d_out.new_empty(d_out.shape[1], x.shape[1], dtype=torch.float32)


class _Product(torch.autograd.Function):
    """x copy^T; the weight takes the gradient of its copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.save_for_backward(x, copy)
        return F.linear(x, copy)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None]:
        x, copy = ctx.saved_tensors
        return d_out @ copy, weight_gradient(d_out.flatten(0, -2), x.flatten(0, -2)), None
