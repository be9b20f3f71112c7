"""Training in 8-bit floats: what is rounded in a block, and the scales it is rounded with, known before the values are.

Delayed scaling (arXiv:2209.05433, section 3.3; NVIDIA's Transformer Engine): a step's scales come from the largest magnitudes of the steps
before it, so no pass over a tensor is needed before the one that rounds it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from minifoundation.model.kernels.quantise import E4M3, E5M2, SLOTS, Site

HISTORY = 16
"""Steps whose largest magnitudes a scale looks back on."""
HEADROOM = {E4M3: 2.0, E5M2: 16.0}
"""How much larger than all of them a value may be before it is cut off; scales are powers of two, which adds up to as much again. Gradients
grow by more than activations from one step to the next, most of all after the first, and their format has the range to spare."""
FIRST = {E4M3: 8.0, E5M2: 2.0**20}
"""Scales before anything has been seen: for normed values and for gradients of a mean over a few thousand tokens and more."""
ALIGNED = 4
"""Floats that a scale takes up: products want its address to be a multiple of 16 bytes."""
SETTLING = 3
"""Forward and backward passes after which scales no longer depend on ``FIRST``: each round mends what the one before cut off."""


class Sites(NamedTuple):
    """The tensors of a block that enter products in 8 bits; None: in half precision."""

    attention_in: Site | None = None
    mixed: Site | None = None
    mlp_in: Site | None = None
    product: Site | None = None
    d_heads: Site | None = None
    d_attention: Site | None = None
    d_gate_up: Site | None = None
    d_mlp: Site | None = None


FORMATS = (E4M3,) * 4 + (E5M2,) * 4
"""Of the fields of ``Sites``: three bits of mantissa for activations, two for gradients, whose range is wider [arXiv:2209.05433]."""


class Scales(nn.Module):
    """The scales of every site, and how they follow what is seen. Not saved with the weights: see ``state``."""

    scale: Tensor
    inverse: Tensor
    largest: Tensor
    history: Tensor
    updates: Tensor
    limit: Tensor
    room: Tensor

    def __init__(self, n_layer: int) -> None:
        super().__init__()
        self.settled = False
        """Whether scales come from what was seen, here or before a checkpoint."""
        formats = FORMATS * n_layer + (E4M3,)
        first = torch.tensor([FIRST[dtype] for dtype in formats], device="cpu")
        for name, value in {
            "scale": first[:, None].repeat(1, ALIGNED),
            "inverse": 1 / first[:, None].repeat(1, ALIGNED),
            "largest": torch.zeros(len(formats), SLOTS, device="cpu"),
            "history": torch.zeros(HISTORY, len(formats), device="cpu"),
            "updates": torch.zeros(1, dtype=torch.int64, device="cpu"),
            "limit": torch.tensor([torch.finfo(dtype).max for dtype in formats], device="cpu"),
            "room": torch.tensor([HEADROOM[dtype] for dtype in formats], device="cpu"),
        }.items():
            self.register_buffer(name, value, persistent=False)

    def sites(self, block: int, *, watched: bool) -> Sites:
        """Return the sites of a block; only ``watched`` ones take part in what the next scales are made of."""
        first = len(FORMATS) * block
        parts = zip(FORMATS, self.scale[first:, :1], self.inverse[first:, :1], self.largest[first:], strict=False)
        return Sites(*(Site(dtype, scale, inverse, largest, watched) for dtype, scale, inverse, largest in parts))

    def head(self, *, watched: bool) -> Site:
        """Return the site of the hidden states that the output head multiplies."""
        return Site(E4M3, self.scale[-1, :1], self.inverse[-1, :1], self.largest[-1], watched)

    @torch.no_grad()
    def update(self) -> Tensor:
        """Set the scales of the next step from what was seen since the last call, and return how many sites were cut off, () float32.

        A scale is a power of two, so that multiplying by it rounds nothing. What is not finite is not taken in: such a step is skipped.
        """
        seen = self.largest.amax(1)
        cut_off = (seen * self.scale[:, 0] > self.limit).sum().float()
        taken = torch.where(seen.isfinite(), seen, 0.0)
        self.history.index_copy_(0, self.updates % HISTORY, taken[None])
        most = self.history.amax(0)
        exact = torch.exp2(torch.floor(torch.log2(self.limit / (self.room * most))))
        self.scale.copy_(torch.where(most > 0, exact.clamp(2.0**-60, 2.0**60), self.scale[:, 0])[:, None])
        self.inverse.copy_(1 / self.scale)
        self.largest.zero_()
        self.updates += 1
        return cut_off

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs to go on with the same scales."""
        return {name: getattr(self, name) for name in ("scale", "history", "updates")}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state``; an empty one is of a run that had nothing in 8 bits, and the first scales are still to be found."""
        if not state:
            return
        for name, value in state.items():
            getattr(self, name).copy_(value)
        self.inverse.copy_(1 / self.scale)
        self.settled = True
