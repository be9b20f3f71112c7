"""One optimizer step: the only forward and backward of training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from statistics import fmean

import torch
from torch import Tensor, nn

from minifoundation.data.batch import Batch
from minifoundation.distributed import World, local_gradients
from minifoundation.train.optimizer import clip, set_learning_rate


class StepStats:
    """What a step measured, on its way from the device: nothing waits until a figure is read.

    On a GPU they are copied to page-locked memory behind the step's last kernel, and reading them waits for that copy alone, not for what
    has been launched since.
    """

    attended_length: float
    """Mean over this process's tokens of the length that attention spans: what ``flops_per_token`` takes."""

    def __init__(self, losses: Tensor, grad_norm: Tensor, stop_votes: Tensor, *, attended_length: float) -> None:
        self.attended_length = attended_length
        figures = torch.cat([losses, grad_norm[None], stop_votes[None]]).detach()
        self._done: torch.cuda.Event | None = None
        if figures.is_cuda:
            self._figures = torch.empty(4, pin_memory=True).copy_(figures, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        else:
            self._figures = figures

    def read(self) -> tuple[float, float, float, bool]:
        """Return mean cross entropy, mean z-loss, gradient norm and whether to stop.

        The losses are nats a token over all processes, the norm is that before clipping, and the last says whether any process had
        been told to stop when the step began.
        """
        if self._done is not None:
            self._done.synchronize()
        cross_entropy, z_loss, grad_norm, stop_votes = self._figures.tolist()
        return cross_entropy, z_loss, grad_norm, stop_votes > 0


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Sequence[Batch],
    *,
    lr: float,
    grad_clip: float | None,
    tokens: int,
    world: World,
    stop: bool = False,
) -> StepStats:
    """Update the weights with the gradient of the mean loss over ``batches`` and return what was measured.

    The losses of the micro-batches are sums, divided once by the step's tokens, so that accumulation equals one large batch
    whatever the split. Gradients accumulate in fp32, the dtype of the weights.

    Args:
        tokens: targets in the step over all processes.
        stop: whether this process has been told to stop; summed with the losses, so that all processes learn of it at the same step.
    """
    set_learning_rate(optimizer, lr)
    sums: list[Tensor] = []
    for number, batch in enumerate(batches, start=1):
        with nullcontext() if number == len(batches) else local_gradients(model):
            losses = model(batch.tokens, batch.targets, batch.cu_seqlens)
            scaler.scale(losses.total * (world.size / tokens)).backward()  # DDP takes the mean over the processes
        sums.append(torch.stack([losses.cross_entropy, losses.z_loss]))
    scaler.unscale_(optimizer)
    grad_norm = clip(optimizer, [p for p in model.parameters() if p.grad is not None], grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    mine = torch.stack(sums).sum(0)
    total = world.total(torch.cat([mine, mine.new_full((1,), float(stop))]))
    return StepStats(total[:2] / tokens, grad_norm, total[2], attended_length=fmean(batch.attended_length for batch in batches))


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Sequence[Batch], world: World, device: torch.device) -> float:
    """Return the mean cross entropy of ``batches``, nats a token; the processes share the work."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches[world.rank :: world.size]:
        there = batch.to(device)
        losses = model(there.tokens, there.targets, there.cu_seqlens)
        sums += torch.stack([losses.cross_entropy.double(), torch.as_tensor(losses.tokens, dtype=torch.float64, device=device)])
    model.train()
    total = world.total(sums)
    return float(total[0] / total[1])
