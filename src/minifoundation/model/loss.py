"""Cross entropy and z-loss of a linear head, chunk by chunk: the logits of all tokens never exist at once.

Letters: N tokens, D model width, V vocabulary, c tokens in a chunk. Why not ``F.linear_cross_entropy``: docs/decisions/0002-loss.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""The target of a token that has no loss."""


class LossSums(NamedTuple):
    """Sums over the tokens that have a loss; a named tuple, because DDP and FSDP look for tensors in what a module returns."""

    total: Tensor
    """Cross entropy + z-loss; the only part with a gradient."""
    cross_entropy: Tensor
    """Nats."""
    z_loss: Tensor
    """Already weighted."""
    tokens: Tensor
    """How many tokens, int64."""


def token_losses(hidden: Tensor, head: Tensor, targets: Tensor, *, z_loss: float, chunk: int, compiled: bool = False) -> LossSums:
    """Return the summed losses of hidden states (N, D) under the head (V, D) for targets (N,); targets of -100 are left out.

    total = sum of logZ - logit[target] + z_loss * logZ^2 (PaLM, arXiv:2204.02311, section 5). Softmax in float32; the gradient is made
    chunk by chunk in the forward, in the dtype of ``hidden``, and that of the head is summed over chunks in float32.

    Args:
        head: cast to the dtype of ``hidden`` for the products.
        chunk: tokens whose logits are held at once.
        compiled: fuse the element-wise part with torch.compile.
    """
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad)
    apply: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _ChunkedLoss.apply
    return LossSums(*apply(hidden, head, targets, z_loss, chunk, compiled, with_gradient))


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, z_loss: float, chunk: int, compiled: bool, with_gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weight = head.to(hidden.dtype)
        sums = torch.zeros(2, dtype=wide, device=hidden.device)  # cross entropy, z-loss
        d_hidden = torch.empty_like(hidden) if with_gradient else None
        d_head = torch.zeros(head.shape, dtype=wide, device=head.device) if with_gradient else None
        losses = _compiled_chunk_losses() if compiled else _chunk_losses
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            part, d_logits = losses(hidden[rows] @ weight.T, targets[rows], z_loss, with_gradient)
            sums += part
            if d_hidden is not None and d_head is not None:
                torch.mm(d_logits, weight, out=d_hidden[rows])
                _add_product(d_head, d_logits.T, hidden[rows])
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
        return d_hidden.mul_(d_total), d_head.mul_(d_total).to(dtype), None, None, None, None, None


def _chunk_losses(logits: Tensor, targets: Tensor, z_loss: float, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Return the sums of cross entropy and z-loss, (2,), and d total / d logits (c, V) in the dtype of ``logits``, which is overwritten."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = targets != IGNORED
    index = targets.clamp(min=0)[:, None]
    log_z = wide.logsumexp(-1)
    target_logit = wide.gather(-1, index).squeeze(-1)
    sums = torch.stack([((log_z - target_logit) * counted).sum(), (z_loss * log_z.square() * counted).sum()])
    if not with_gradient:
        return sums, logits
    slope = (1 + 2 * z_loss * log_z) * counted  # d total / d logZ
    d_target = (target_logit - log_z).exp() * slope - counted.to(wide.dtype)
    d_logits = wide.sub_(log_z[:, None]).exp_().mul_(slope[:, None]).to(logits.dtype)
    # The target's entry is set after the cast: p - 1 taken in bfloat16 loses every digit of a confident prediction.
    return sums, d_logits.scatter_(-1, index, d_target.to(logits.dtype)[:, None])


@cache
def _compiled_chunk_losses() -> Callable[[Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]:
    return torch.compile(_chunk_losses, dynamic=False)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``left @ right`` to ``total`` in the dtype of ``total``, without rounding the product to the dtype of its factors."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)
    elif left.is_cuda:
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        torch.addmm(total, left.to(total.dtype), right.to(total.dtype), out=total)
