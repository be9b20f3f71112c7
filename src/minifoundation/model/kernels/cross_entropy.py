"""Cross entropy and z-loss of logits, which their gradient overwrites: each logit is read and written once in device memory.

Letters: c tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minifoundation.model.kernels.language import jit, runs_on, tl

COLUMNS = 4096  # two passes over a row of 59,392 bf16 logits: the second reads the level-2 cache


def plain_losses_(logits: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    """Return cross entropy and z-loss of each token, (2, c), and overwrite ``logits`` (c, V) by the gradient of their sum.

    Tokens with a negative target have no loss and no gradient. All is done in float32 (float64 for logits in it). The gradient is rounded
    once, at the target too: p - 1 taken from a bfloat16 p loses every digit of a confident prediction.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = targets >= 0
    index = targets.clamp(min=0)[:, None]
    log_z = wide.logsumexp(-1)
    losses = torch.stack([log_z - wide.gather(-1, index)[:, 0], z_loss * log_z.square()]) * counted
    slope = (1 + 2 * z_loss * log_z) * counted  # d total / d logZ
    gradient = wide.sub_(log_z[:, None]).exp_().mul_(slope[:, None])
    gradient.scatter_add_(-1, index, -counted[:, None].to(wide.dtype))
    if gradient.dtype != logits.dtype:
        logits.copy_(gradient)
    return losses


def losses_(logits: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    """Return ``plain_losses_`` of contiguous ``logits``."""
    if not runs_on(logits):
        return plain_losses_(logits, targets, z_loss)
    losses = torch.empty(2, len(logits), device=logits.device)
    launch_losses_(logits, targets, z_loss, losses)
    return losses


def launch_losses_(logits: Tensor, targets: Tensor, z_loss: float, losses: Tensor) -> None:
    """Write the losses and overwrite the logits by their gradient."""
    c, V = logits.shape
    _losses[(c,)](logits, targets, losses, z_loss, c, V=V, COLUMNS=COLUMNS, num_warps=16)


@jit
def _losses(logits, targets, losses, z_loss, c, V: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
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
