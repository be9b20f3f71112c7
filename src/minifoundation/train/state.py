"""What a run is made of, what it starts from, and how far it has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from minifoundation.checkpoint import Checkpoint, Saver
from minifoundation.config import RunConfig
from minifoundation.data.held_out import HeldOut
from minifoundation.data.ledger import entries
from minifoundation.data.loader import Loader
from minifoundation.data.supply import Supply
from minifoundation.distributed import Watch, World, trained
from minifoundation.model.transformer import Transformer
from minifoundation.runtime import Machine
from minifoundation.train.ema import Average
from minifoundation.train.guard import Guard
from minifoundation.train.kernels import Kernels
from minifoundation.train.optimizer import optimizer_state
from minifoundation.train.parallel import as_asked
from minifoundation.train.plan import Plan
from minifoundation.train.printer import Say
from minifoundation.train.suite import Suite


@dataclass(frozen=True)
class Start:
    """What a phase begins from, when it is not random weights."""

    phase: str
    checkpoint: Checkpoint
    with_optimizer: bool = False
    """The optimizer's moments go on too."""


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
    imported_from: str | None = None
    """The folder whose weights began it all, however many phases ago, where they came from elsewhere: what those had read is not known."""
    samples_per_step: int = 0
    held_out_bits_per_byte: float | None = None
    due: dict[str, Any] | None = None
    """The row of a step whose evaluation was cut short by a stop; it is made up for when the run goes on."""
    skipped: list[dict[str, Any]] = field(default_factory=list)
    """The steps that changed nothing: step, first sample, end, reason."""
    skipped_in_a_row: int = 0
    stepped_over: list[list[int]] = field(default_factory=list)
    """First sample and end of what the run went back over and leaves out."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def place(self, size: int) -> int:
        """Return the first sample of the next step, of ``size`` samples: what is stepped over lies behind it."""
        return beyond(self.sample, size, self.stepped_over)

    def places(self, steps: int, size: int) -> Iterator[int]:
        """Yield the first sample of each of the next steps."""
        sample = self.sample
        for _ in range(steps):
            sample = beyond(sample, size, self.stepped_over)
            yield sample
            sample += size

    def end(self, steps: int, size: int) -> int:
        """Return the number of samples up to the end of the next ``steps`` steps, the ones stepped over among them."""
        sample = self.sample
        for first, end in sorted(self.stepped_over) if steps else ():
            if sample < end:
                before = max(0, (first - sample) // size)  # steps that fit in front of what is stepped over
                if before >= steps:
                    break
                sample, steps = end, steps - before
        return sample + steps * size


def beyond(sample: int, size: int, holes: Sequence[Sequence[int]]) -> int:
    """Return the first sample, from ``sample`` on, at which ``size`` samples begin that lie in none of ``holes`` (first, end)."""
    for first, end in sorted(holes, key=min):
        if first < sample + size and sample < end:
            sample = end
    return sample


@dataclass(frozen=True)
class Phase:
    """One phase of training: what it is to do, where, and what it begins from."""

    config: RunConfig
    plan: Plan
    machine: Machine
    world: World
    start: Start | None
    """What it begins from; None: random weights."""
    suite: Suite | None
    """The benchmarks that are run on the weights as they are."""
    say: Say
    """Prints a line for the person, on the first process."""


@dataclass(frozen=True)
class Training(Phase):
    """A phase and what is built for it."""

    kernels: Kernels
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
    guard: Guard
    watch: Watch
    saver: Saver

    def checkpoint(self, *, with_optimizer: bool) -> Checkpoint:
        """Return the run as it stands.

        The tensors are those of the run, split as they are, and not copies, but for the small ones that change first in a step.
        """
        read = entries(self.loader.sources, self.loader.mixture, self.progress.sample, self.progress.phase)
        checkpoint = Checkpoint(
            config=as_asked(self.config),
            model={**self.transformer.state_dict(), **{name: weight.detach() for weight, name in self.names.items()}},
            tokenizer_model=self.tokenizer_model,
            progress=self.progress.as_dict(),
            ledger=[*self.earlier, *(entry.as_dict() for entry in read)],
            ema=self.average.state() if self.average else None,
            kernels=self.kernels._asdict(),
        )
        if with_optimizer:
            checkpoint.optimizer = optimizer_state(self.optimizer, self.names)
            checkpoint.scaler = self.scaler.state_dict()
            checkpoint.window = self.guard.state()
            checkpoint.kernel_state = self.transformer.scales.state() if self.transformer.scales is not None else {}
        return checkpoint

    def scores(self, told: Callable[[], bool]) -> dict[str, float | None] | None:
        """Return the scores of the weights as they are on the run's benchmarks; None when told to stop before the end."""
        assert self.suite is not None
        checkpoint = self.checkpoint(with_optimizer=False).in_host_memory(kept=True)
        scores = self.suite.scores(checkpoint, self.machine, self.world, told)
        self.machine.forget()
        return scores

    @property
    def names(self) -> dict[Tensor, str]:
        """The name of each weight that the optimizer updates."""
        return {weight: name for name, weight in trained(self.model, dict(self.transformer.named_parameters())).items()}

    def save(self) -> None:
        """Save a step checkpoint: the first process writes it, and all give it their parts.

        Where the first process cannot write beside the training, the others wait here for it: in the next step it would be behind, which
        ``Watch`` takes for standing still.

        Raises:
            UserError, OSError: as ``Saver.save``, on every process.
        """
        checkpoint = self.checkpoint(with_optimizer=True)
        if not self.world.agreed(lambda: self.saver.accepts(checkpoint)):
            return
        with self.world.together():
            if self.world.is_first:
                self.saver.write(checkpoint)  # not ``save``, which asks once more: the others gather by now
            else:
                for _ in checkpoint.gathered():
                    pass
