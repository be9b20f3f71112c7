"""Initial weights: the same for a seed on any device and any number of cores."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**22
"""Numbers drawn by one generator: one generator for all would be one core for all."""


@torch.no_grad()
def draw_normals(weights: Sequence[tuple[Tensor, float]], seed: int) -> None:
    """Fill each of ``weights`` (contiguous, on any device) with normal numbers of mean 0 and the standard deviation beside it.

    Chunk number n of all weights, in their order, is drawn on the CPU from a generator seeded with ``seed`` and n.
    """
    chunks = [(part, std) for weight, std in weights for part in weight.detach().view(-1).split(CHUNK)]

    def fill(number: int, part: Tensor, std: float) -> None:
        state = np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)
        generator = torch.Generator("cpu").manual_seed(int(state[0] >> np.uint64(1)))
        part.copy_(torch.empty(part.shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator))

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(fill, count(), *zip(*chunks, strict=True)))
