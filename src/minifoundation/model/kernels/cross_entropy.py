"""Cross entropy and z-loss of logits, which their gradient overwrites: each logit is read and written once in device memory.

Letters: c tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minifoundation.model.kernels.language import jit, runs_on, tl

COLUMNS = 4096  # two passes over a row of 59,392 bf16 logits: the second reads the level-2 cache


GRADIENT_SCALE = 2.0**14
"""Of gradients in 8 bits, which are 1 at most, and a hundredth more under a z-loss of 1e-4: to the middle of E5M2's range."""


def plain_losses_(logits: Tensor, targets: Tensor, z_loss: float, small: Tensor | None = None) -> Tensor:
    """Return cross entropy and z-loss of each token, (2, c), and overwrite ``logits`` (c, V) by the gradient of their sum.

    Tokens with a negative target have no loss and no gradient. All is done in float32 (float64 for logits in it). The gradient is rounded
    once, at the target too: p - 1 taken from a bfloat16 p loses every digit of a confident prediction.

    Args:
        small: (c, V) E5M2, takes the gradient times ``GRADIENT_SCALE`` as well.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = targets >= 0
    index = targets.clamp(min=0)[:, None]
    log_z = wide.logsumexp(-1)
    losses = torch.stack([log_z - wide.gather(-1, index)[:, 0], z_loss * log_z.square()]) * counted
    slope = (1 + 2 * z_loss * log_z) * counted  # d total / d logZ
    gradient = wide.sub_(log_z[:, None]).exp_().mul_(slope[:, None])
    gradient.scatter_add_(-1, index, -counted[:, None].to(wide.dtype))
    if small is not None:
        small.copy_((gradient * GRADIENT_SCALE).to(small.dtype))
    if gradient.dtype != logits.dtype:
        logits.copy_(gradient)
    return losses


def losses_(logits: Tensor, targets: Tensor, z_loss: float, small: Tensor | None = None) -> Tensor:
    """Return ``plain_losses_`` of contiguous ``logits``."""
    if not runs_on(logits):
        return plain_losses_(logits, targets, z_loss, small)
    losses = torch.empty(2, len(logits), device=logits.device)
    launch_losses_(logits, targets, z_loss, losses, small)
    return losses


def launch_losses_(logits: Tensor, targets: Tensor, z_loss: float, losses: Tensor, small: Tensor | None = None) -> None:
    """Write the losses and overwrite the logits by their gradient, which ``small`` takes too."""
    c, V = logits.shape
    into = logits if small is None else small
    constants = {"V": V, "COLUMNS": COLUMNS, "SMALL": small is not None, "SCALE": GRADIENT_SCALE}
    _losses[(c,)](logits, targets, losses, into, z_loss, c, num_warps=16, **constants)


@jit
def _losses(  # type: ignore[no-untyped-def]
    logits, targets, losses, small, z_loss, c, V: tl.constexpr, COLUMNS: tl.constexpr, SMALL: tl.constexpr, SCALE: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * V
    target = tl.load(targets + token)
    counted = target >= 0
    column = tl.arange(0, COLUMNS)
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, V, COLUMNS):
        part = tl.load(row + start + column, mask=start + column < V, other=float("-inf")).to(tl.float32)
        raised = tl.maximum(highest, tl.max(part))
        total = total * tl.exp(highest - raised) + tl.exp(part - raised)
        highest = raised
    log_z = highest + tl.log(tl.sum(total))
    target_logit = tl.load(row + tl.where(counted, target, 0)).to(tl.float32)
    tl.store(losses + token, tl.where(counted, log_z - target_logit, 0.0))
    tl.store(losses + c + token, tl.where(counted, z_loss * log_z * log_z, 0.0))
    slope = tl.where(counted, 1 + 2 * z_loss * log_z, 0.0)
    tl.debug_barrier()  # every thread has read the target's logit before one overwrites it
    for start in range(0, V, COLUMNS):
        inside = start + column < V
        part = tl.load(row + start + column, mask=inside, other=float("-inf")).to(tl.float32)
        gradient = tl.exp(part - log_z) * slope
        gradient = tl.where(counted & (start + column == target), gradient - 1, gradient)
        tl.store(row + start + column, gradient.to(logits.dtype.element_ty), mask=inside)
        if SMALL:
            tl.store(small + token * V + start + column, (gradient * SCALE).to(small.dtype.element_ty), mask=inside)
