"""What a run is made of, what it starts from, and how far it has come."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from minifoundation.checkpoint import Checkpoint, save_step
from minifoundation.config import RunConfig
from minifoundation.data.held_out import HeldOut
from minifoundation.data.ledger import entries
from minifoundation.data.loader import Loader
from minifoundation.data.supply import Supply
from minifoundation.distributed import World
from minifoundation.model.transformer import Transformer
from minifoundation.runtime import Machine
from minifoundation.train.ema import Average
from minifoundation.train.plan import Plan


@dataclass(frozen=True)
class Start:
    """What a phase begins from, when it is not random weights."""

    phase: str
    checkpoint: Checkpoint


@dataclass
class Progress:
    """How far a phase has come: the one mutable object of the loop."""

    step: int = 0
    tokens: int = 0
    sample: int = 0
    """The place in the data: the next sample of this phase."""
    first_shards: dict[str, int] = field(default_factory=dict)
    """The shard of each source at which the phase began to read."""
    phase: str = "pretrain"
    held_out_bits_per_byte: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Training:
    """What a phase of training is made of."""

    config: RunConfig
    plan: Plan
    machine: Machine
    world: World
    transformer: Transformer
    model: nn.Module
    """``transformer`` with its loss, spread over the processes: what a step calls."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None
    loader: Loader
    held_out: HeldOut
    supply: Supply | None
    """The process that makes the shards which are still missing; None on other processes than the first, and where none are."""
    progress: Progress
    tokenizer_model: bytes
    earlier: list[dict[str, Any]]
    """The ledger of the phases before."""

    def checkpoint(self, *, with_optimizer: bool) -> Checkpoint:
        """Return the run as it stands."""
        states = {"adamw": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()} if with_optimizer else {}
        read = entries(self.loader.sources, self.loader.mixture, self.progress.sample, self.progress.phase)
        return Checkpoint(
            config=self.config,
            model=self.transformer.state_dict(),
            tokenizer_model=self.tokenizer_model,
            progress=self.progress.as_dict(),
            ledger=[*self.earlier, *(entry.as_dict() for entry in read)],
            ema=self.average.state() if self.average else None,
            optimizer=states,
            kernels={"attention": self.transformer.kernel(self.machine.device, masked=self.config.data.mask_documents)},
        )

    def save(self) -> None:
        """Write the step checkpoint, on the first process."""
        if self.world.is_first:
            save_step(self.checkpoint(with_optimizer=True), self.config.out_dir, keep=self.config.train.keep)
