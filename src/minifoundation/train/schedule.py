"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from minifoundation.config import TrainConfig


def warmup_steps(config: TrainConfig, steps: int) -> int:
    """Return the number of steps with rising rate."""
    return _part(config.warmup, steps)


def _part(share: float, steps: int) -> int:
    """Return ``share`` of the steps, rounded up: 0.07 of 100 is 7, although in binary it is a little more."""
    return math.ceil(round(share * steps, 6))


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Return the rate of update ``step`` (0 .. steps - 1) of a phase of ``steps``.

    Linear warm-up to ``lr``, then: ``cosine`` falls to ``min_lr * lr`` at the last step (SGDR without restarts, arXiv:1608.03983);
    ``constant`` stays; ``wsd`` stays and falls linearly over the last ``decay`` share (arXiv:2404.06395, linear as in arXiv:2405.18392).
    """
    rising = warmup_steps(config, steps)
    if step < rising:
        return config.lr * (step + 1) / rising
    floor = config.min_lr * config.lr
    match config.schedule:
        case "constant":
            return config.lr
        case "cosine":
            done = (step - rising) / max(1, steps - 1 - rising)
            return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        case "wsd":
            falling = max(1, _part(config.decay, steps))
            done = max(0.0, (step - (steps - 1 - falling)) / falling)
            return config.lr - (config.lr - floor) * done
