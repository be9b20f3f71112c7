"""Bad steps, told on the device: losses and gradients that are not finite, and spikes among those that are."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

GOOD: Final = 0
REASONS = {
    1: "loss not finite",
    2: "gradient not finite",
    3: "loss spike",
    4: "gradient spike",
    5: "fp16 overflow",
}
"""Verdicts on a step by the number that the device has for them; 0 is a good one."""

OVERFLOW: Final = 5
"""A gradient that is not finite under a loss scale above 1: no fault of the step, the scale comes down."""

MAD_OF_A_NORMAL = 1.4826
"""Standard deviations in a median absolute deviation, of a normal distribution."""

FLOOR = (0.02, 0.2)
"""The least deviation that counts as one, as a share of the median: of losses, and of gradient norms, which vary more and fall with
training. At 10 deviations a spike is at least 20% over the median loss, or three times the median norm."""


class Guard:
    """The verdict on each step, and the window of good steps that spikes are told by.

    A spike is a value more than ``spike_z`` robust standard deviations above the median of the last ``size`` good steps; the deviation is
    that of the median absolute one, and not below ``FLOOR``. Nothing is judged before half of the window is filled. All of it stays
    on the device, so that nothing waits for a figure.

    Args:
        spike_z: None judges by finiteness alone.
        state: of an earlier process, from ``state``.
    """

    def __init__(self, spike_z: float | None, size: int, device: torch.device, state: dict[str, Tensor] | None = None) -> None:
        self.spike_z = spike_z
        self.size = size
        self._values = torch.full((2, size), float("inf"), device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._places = torch.arange(size, device=device)
        self._floor = torch.tensor(FLOOR, device=device)
        if state:
            values, count = state["values"].to(device), int(state["count"])
            before = values.shape[1]
            if before != size:  # the last steps in their order, as many as there are and have room
                kept = min(count, before, size)
                values, count = values[:, torch.arange(count - kept, count, device=device) % before], kept
            self._values[:, : values.shape[1]] = values
            self._count.fill_(count)

    def state(self) -> dict[str, Tensor]:
        """Return what a later process goes on with."""
        return {"values": self._values, "count": self._count}

    @torch.no_grad()
    def judge(self, loss: Tensor, norm: Tensor, scale: Tensor | None) -> Tensor:
        """Return [verdict, deviations of the loss, deviations of the norm] of a step, and take a good one into the window.

        Args:
            loss: mean over the step.
            norm: of its gradient.
            scale: of the loss in fp16.
        """
        values = torch.stack([loss, norm]).float()
        finite = values.isfinite()
        known = self._count.clamp(max=self.size)
        middle = ((known - 1).clamp(min=0) // 2).expand(2, 1)
        # Sorted, not torch.median, which has no deterministic form on CUDA. What is not filled is infinite and comes last.
        median = self._values.sort(dim=1).values.gather(1, middle).squeeze(1)
        distance = (self._values - median[:, None]).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
        mad = distance.sort(dim=1).values.gather(1, middle).squeeze(1)
        deviation = torch.maximum(MAD_OF_A_NORMAL * mad, self._floor * median.abs())
        z = torch.where(finite & (known >= max(1, self.size // 2)), (values - median) / deviation, 0.0)
        spike = z > (float("inf") if self.spike_z is None else self.spike_z)
        overflow = torch.zeros_like(finite[1]) if scale is None else scale > 1
        verdict = torch.where(spike[1], 4, GOOD)
        verdict = torch.where(spike[0], 3, verdict)
        verdict = torch.where(finite[1], verdict, torch.where(overflow, OVERFLOW, 2))
        verdict = torch.where(finite[0], verdict, 1)
        good = verdict == GOOD
        place = self._places == self._count % self.size
        self._values.copy_(torch.where(place & good, values[:, None], self._values))
        self._count += good
        return torch.cat([verdict.float()[None], z])
