"""Cross entropy and z-loss of a linear head, chunk by chunk: the logits of all tokens never exist at once.

Letters: N tokens, D model width, V vocabulary, c tokens in a chunk. Why not ``F.linear_cross_entropy``: docs/decisions/0002-loss.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minifoundation.model.kernels.cross_entropy import GRADIENT_SCALE, losses_
from minifoundation.model.kernels.quantise import E5M2, Rounded, Site, rounded
from minifoundation.model.matrix import add_product, small_product

IGNORED = -100
"""The target of a token that has no loss."""


class LossSums(NamedTuple):
    """Sums over the tokens that have a loss; a named tuple, because FSDP looks for tensors in what a module returns."""

    total: Tensor
    """Cross entropy + z-loss; the only part with a gradient."""
    cross_entropy: Tensor
    """Nats."""
    z_loss: Tensor
    """Already weighted."""
    tokens: Tensor
    """How many tokens, int64."""


def token_losses(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    z_loss: float,
    chunk: int,
    head_copy: Tensor | None = None,
    small: tuple[Site, Rounded] | None = None,
) -> LossSums:
    """Return the summed losses of hidden states (N, D) under the head (V, D) for targets (N,); targets of -100 are left out.

    total = sum of logZ - logit[target] + z_loss * logZ^2 (PaLM, arXiv:2204.02311, section 5). Softmax in float32; the gradient is made
    chunk by chunk in the forward, in the dtype of ``hidden``, and that of the head is summed over chunks in float32.

    Args:
        chunk: tokens whose logits are held at once.
        head_copy: the head in the dtype of ``hidden``, which multiplies it; made here when None.
        small: how hidden states are rounded to 8 bits, and the head in 8 bits; logits and the gradient of hidden states are then products
            of these, that of the head is one in half precision as before.
    """
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    copy = head.detach().to(hidden.dtype) if head_copy is None else head_copy
    apply: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _ChunkedLoss.apply
    return LossSums(*apply(hidden, head, copy, targets, z_loss, chunk, with_gradient, small))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        copy: Tensor,
        targets: Tensor,
        z_loss: float,
        chunk: int,
        with_gradient: bool,
        small: tuple[Site, Rounded] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        sums = torch.zeros(2, dtype=wide, device=hidden.device)  # cross entropy, z-loss
        d_hidden = torch.empty_like(hidden) if with_gradient else None
        d_head = torch.empty(head.shape, dtype=wide, device=head.device) if with_gradient else None
        buffer = hidden.new_empty(min(chunk, len(hidden)), len(copy))
        if small is not None:
            site, head_small = small
            hidden_small = rounded(hidden, site, columns=False)
            gradient_small = torch.empty_like(buffer, dtype=E5M2)
            inverse = torch.full((1,), 1 / GRADIENT_SCALE, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = buffer[: len(targets[rows])]
            if small is None:
                torch.mm(hidden[rows], copy.T, out=logits)
                sums += losses_(logits, targets[rows], z_loss).sum(-1)  # now ``logits`` is their gradient
            else:
                assert hidden_small.rows is not None
                small_product(hidden_small.rows[rows], head_small.rows, hidden_small.inverse, head_small.inverse, out=logits)
                sums += losses_(logits, targets[rows], z_loss, gradient_small[: len(logits)]).sum(-1)
            if d_hidden is not None and d_head is not None:
                if small is None:
                    torch.mm(logits, copy, out=d_hidden[rows])
                else:
                    small_product(gradient_small[: len(logits)], head_small.columns, inverse, head_small.inverse, out=d_hidden[rows])
                add_product(d_head, logits.T, hidden[rows], first=start == 0)
        ctx.gradients = d_hidden, d_head, head.dtype
        count = (targets != IGNORED).sum()
        total, cross_entropy, z = sums.sum(), sums[0].clone(), sums[1].clone()
        ctx.mark_non_differentiable(cross_entropy, z, count)
        return total, cross_entropy, z, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_head, dtype = ctx.gradients
        ctx.gradients = None  # scaled in place below, so good for one backward only
        # d_total carries the loss scale: it multiplies here, where an overflow becomes inf and the scaler skips the step.
        # As a row of one number, since a GPU rounds a number of no dimension to the dtype of what it multiplies.
        return d_hidden.mul_(d_total.view(1)), d_head.mul_(d_total).to(dtype), None, None, None, None, None, None
