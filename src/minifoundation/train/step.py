"""One optimizer step: the only forward and backward of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minifoundation.data.batch import Batch
from minifoundation.distributed import World, finish_gradients, local_gradients, share_weights
from minifoundation.model.fp8 import SETTLING, Scales
from minifoundation.train.guard import GOOD, Guard
from minifoundation.train.optimizer import clip, set_learning_rate, update
from minifoundation.train.parallel import share_of


class Figures(NamedTuple):
    """What a step measured; losses are nats a token over all processes."""

    loss: float
    """Mean cross entropy."""
    z_loss: float
    grad_norm: float
    """Before clipping."""
    stop: bool
    """Some process had been told to stop when the step began."""
    verdict: int = GOOD
    """Why the step was skipped, as ``guard.REASONS`` has it."""
    loss_deviations: float = 0.0
    """How far the loss is above the median of the steps before, in robust standard deviations."""
    norm_deviations: float = 0.0
    cut_off: float = 0.0
    """Tensors in 8 bits of which some value was larger than its scale foresaw."""


class StepStats:
    """What a step measured, on its way from the device: nothing waits until a figure is read.

    On a GPU they are copied to page-locked memory behind the step's last kernel, and reading them waits for that copy alone, not for what
    has been launched since.
    """

    attended_length: float
    """Mean over this process's tokens of the length that attention spans: what ``flops_per_token`` takes."""
    taken: Tensor
    """On the device: 1 when the step changed the weights, 0 when it was skipped."""

    def __init__(self, figures: Tensor, *, attended_length: float) -> None:
        self.attended_length = attended_length
        self.taken = (figures[4] == GOOD).to(torch.float32)
        self._done: torch.cuda.Event | None = None
        if figures.is_cuda:
            self._figures = torch.empty(len(figures), pin_memory=True).copy_(figures, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        else:
            self._figures = figures

    def read(self) -> Figures:
        """Return the figures, once the device has done the step."""
        if self._done is not None:
            self._done.synchronize()
        loss, z_loss, norm, stop_votes, verdict, *deviations = self._figures.tolist()
        return Figures(loss, z_loss, norm, stop_votes > 0, int(verdict), *deviations)


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
    guard: Guard | None = None,
    hold: Callable[[], None] | None = None,
    scales: Scales | None = None,
) -> StepStats:
    """Update the weights with the gradient of the mean loss over ``batches`` and return what was measured.

    The losses of the micro-batches are sums, divided once by the step's tokens, so that accumulation equals one large batch
    whatever the split. Gradients accumulate in fp32, the dtype of the weights. A step that ``guard`` finds bad changes neither weights
    nor optimizer, its count of steps included; no process waits for the verdict.

    Args:
        tokens: targets in the step over all processes.
        stop: whether this process has been told to stop; summed with the losses, so that all processes learn of it at the same step.
        guard: judges the step; None skips only a step whose loss or gradient is not finite.
        hold: called before anything of the state is changed.
        scales: of the model's 8-bit tensors; they follow what this step has seen, a skipped one too.
    """
    set_learning_rate(optimizer, lr)
    sums: list[Tensor] = []
    for number, batch in enumerate(batches, start=1):
        with nullcontext() if number == len(batches) else local_gradients(model):
            losses = model(batch.tokens, batch.targets, batch.cu_seqlens)
            scaler.scale(losses.total * (world.size / tokens)).backward()  # gradients become means over the processes
        sums.append(torch.stack([losses.cross_entropy, losses.z_loss]))
    finish_gradients(model)
    mine = torch.stack(sums).sum(0).detach()
    total = world.total(torch.cat([mine, mine.new_full((1,), float(stop))]))
    mean = total[:2] / tokens
    scaler.unscale_(optimizer)
    grad_norm = clip(optimizer, grad_clip, world).detach()
    if hold is not None:
        hold()
    guard = guard or Guard(None, 1, mean.device)
    verdict = guard.judge(mean[0], grad_norm, scaler.scale(torch.ones_like(grad_norm)) if scaler.is_enabled() else None)
    update(optimizer, skip=(verdict[0] != GOOD).to(torch.float32))
    share_weights(model)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    figures = torch.cat([mean, grad_norm[None].to(mean.dtype), total[2:], verdict])
    if scales is not None:
        figures = torch.cat([figures, _followed(scales, world)[None]])
    return StepStats(figures, attended_length=fmean(batch.attended_length for batch in batches))


def settle(model: nn.Module, scales: Scales | None, batch: Batch, *, tokens: int, world: World) -> None:
    """Find the first scales of 8-bit tensors by a few passes over ``batch`` that change nothing else; later calls do nothing.

    Args:
        scales: None where nothing is in 8 bits.
        tokens: targets in a step over all processes.
    """
    if scales is None or scales.settled:
        return
    for _ in range(SETTLING):
        with local_gradients(model):
            (model(batch.tokens, batch.targets, batch.cu_seqlens).total * (world.size / tokens)).backward()
        model.zero_grad(set_to_none=True)
        _followed(scales, world)
    scales.settled = True


def _followed(scales: Scales, world: World) -> Tensor:
    """Set the scales of the next step, the same on every process, and return how many tensors were cut off."""
    if world.size > 1:
        scales.largest.copy_(-world.least(-scales.largest))
    return scales.update()


@torch.no_grad()
def held_out_loss(
    model: nn.Module, batches: Sequence[Batch], world: World, device: torch.device, told: Callable[[], bool] | None = None
) -> float | None:
    """Return the mean cross entropy of ``batches``, nats a token; the processes share the work.

    Args:
        told: whether this process has been told to stop; all processes then give up together, with None.
    """
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    ways = world.dp_size
    rounded_up = -(-len(batches) // ways) * ways
    for first in range(0, len(batches), POLLED * ways):
        if told is not None and float(world.total(torch.tensor(float(told()), device=device))) > 0:
            model.train()
            return None
        for number in range(first + world.dp_rank, min(first + POLLED * ways, rounded_up), ways):
            # Where weights are split all processes go through the model together: one without a batch of its own does the last again.
            there = share_of(batches[min(number, len(batches) - 1)], world).to(device)
            losses = model(there.tokens, there.targets, there.cu_seqlens)
            if number < len(batches):
                sums += torch.stack([losses.cross_entropy.double(), torch.as_tensor(losses.tokens, dtype=torch.float64, device=device)])
    model.train()
    total = world.total(sums)
    return float(total[0] / total[1])


POLLED = 8
"""Held-out micro-batches that each process does between two looks at whether to stop."""
