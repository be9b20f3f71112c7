"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from minifoundation.distributed import local, part_of


class Average:
    """Holds ``decay * average + (1 - decay) * weight`` of each parameter, in fp32 on the parameters' device and split as they are.

    The decay is held down early to ``(1 + n) / (10 + n)`` after n updates, so that the initial weights are forgotten
    (the warm-up of TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float, state: dict[str, Tensor] | None = None) -> None:
        self.decay = decay
        self.names = list(parameters)
        self.weights = list(parameters.values())
        self.averages = [(part_of(state[n], p) if state else p.detach()).clone() for n, p in parameters.items()]

    @torch.no_grad()
    def update(self, step: int, taken: Tensor) -> None:
        """Take in the weights after step number ``step`` (from 1); not at all where ``taken``, on the device, is 0: a skipped step."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, weights = [local(average) for average in self.averages], [local(weight) for weight in self.weights]
        torch._foreach_lerp_(averages, weights, [taken * (1 - decay)] * len(weights))

    def state(self) -> dict[str, Tensor]:
        """Return the averages by parameter name."""
        return dict(zip(self.names, self.averages, strict=True))
