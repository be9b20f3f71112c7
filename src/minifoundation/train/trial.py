"""Training steps on random tokens: what a run takes, measured before it starts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from minifoundation import runtime
from minifoundation.config import RunConfig
from minifoundation.data.batch import Batch, prefetch
from minifoundation.data.tokenizer import EOS, UNK
from minifoundation.distributed import Context, Split, World, trained
from minifoundation.model.size import flops_per_token
from minifoundation.model.training import TrainingModel
from minifoundation.runtime import Machine, Moment
from minifoundation.train.breakdown import Breakdown, breakdown
from minifoundation.train.ema import Average
from minifoundation.train.guard import Guard
from minifoundation.train.kernels import DOCUMENT_TOKENS, Kernels, swiglu_kernel, transformer_for
from minifoundation.train.metrics import model_flops_utilisation
from minifoundation.train.optimizer import adamw
from minifoundation.train.parallel import share_of, spread_over
from minifoundation.train.plan import ALONE, predicted_memory
from minifoundation.train.step import StepStats, settle, train_step

ONE = World()

WARM_UP = 3
"""Steps before the first that counts: the first compiles, the second runs with the optimizer's moments, the third is steady."""


@dataclass(frozen=True)
class Trial:
    """What some steps took."""

    kernel: str
    """Of attention."""
    swiglu: str
    tokens_per_step: int
    seconds: list[float]
    """Of each step that counts, from the end of the one before, on the device's clock."""
    first_seconds: float
    """Of the first step, in which everything is compiled."""
    losses: tuple[float, float]
    """Of the first and the last step: a step that computes something else shows."""
    graphs_after_warm_up: int
    """How many graphs were compiled when nothing should have been."""
    peak_bytes: int
    predicted: dict[str, int]
    """Bytes by what holds them, of the same peak."""
    mfu: float | None
    breakdown: Breakdown | None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / statistics.median(self.seconds)

    def figures(self) -> dict[str, object]:
        """Return the figures as JSON takes them."""
        peak, predicted = self.peak_bytes / 2**30, sum(self.predicted.values()) / 2**30
        return {
            "kernel": self.kernel,
            "swiglu": self.swiglu,
            "tokens_per_second": round(self.tokens_per_second),
            "ms_per_step": round(1e3 * statistics.median(self.seconds), 2),
            "ms_spread": [round(1e3 * min(self.seconds), 2), round(1e3 * max(self.seconds), 2)],
            "mfu": self.mfu and round(self.mfu, 4),
            "first_step_seconds": round(self.first_seconds, 1),
            "graphs_after_warm_up": self.graphs_after_warm_up,
            "losses": [round(loss, 5) for loss in self.losses],
            "peak_gib": round(peak, 3),
            "predicted_gib": round(predicted, 3),
            "predicted_over_measured": round(predicted / peak, 3),
            "predicted_parts_gib": {name: round(size / 2**30, 3) for name, size in self.predicted.items()},
            **({"profile": self.breakdown.figures()} if self.breakdown else {}),
        }


def trial(
    config: RunConfig,
    machine: Machine,
    *,
    steps: int,
    warm_up: int = WARM_UP,
    profiled: bool = False,
    world: World = ONE,
    split: Split = ALONE,
) -> Trial:
    """Return what ``steps`` steps of ``config`` take after ``warm_up`` others: ``train_step`` and the way of batches to the device.

    ``batch_size`` must be a number. Data are random tokens, from memory; where attention stays within documents, these are of
    ``DOCUMENT_TOKENS``. Of several processes each has its own, and all call this together.

    Args:
        profiled: find out, in one more step, where the time goes.

    Raises:
        torch.OutOfMemoryError: it does not fit; ``Machine.forget`` gives the memory back once the exception is handled.
    """
    machine.forget()
    train = config.train
    assert isinstance(train.batch_size, int)
    tokens = train.batch_size * train.grad_accum * train.seq_len * world.dp_size
    alone = random_model(config, machine, split, world.context)
    model = spread_over(alone, config, machine, world, split)
    weights = trained(model, dict(alone.named_parameters()))
    optimizer = adamw(weights, train)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=train.precision == "fp16")
    average = Average(weights, train.ema) if train.ema is not None else None
    scales, guard = alone.transformer.scales, Guard(train.spike_z, train.spike_window, machine.device)
    stats: list[StepStats] = []
    ends: list[Moment] = []
    mine = ([share_of(batch, world) for batch in micro] for micro in _random_steps(config, world.dp_rank))
    with prefetch(mine, machine.device) as batches, runtime.collector_held() as collect:

        def step() -> None:
            micro = next(batches)
            settle(model, scales, micro[0], tokens=tokens, world=world)
            stats.append(
                train_step(
                    model,
                    optimizer,
                    scaler,
                    micro,
                    lr=1e-4,
                    grad_clip=train.grad_clip,
                    tokens=tokens,
                    world=world,
                    guard=guard,
                    scales=scales,
                )
            )
            if average is not None:
                average.update(len(stats), stats[-1].taken)
            ends.append(Moment(machine))

        began = time.perf_counter()
        step()
        machine.synchronize()
        first_seconds = time.perf_counter() - began
        collect()
        for _ in range(warm_up - 1):
            step()
        graphs = runtime.compiled_graphs()
        for _ in range(steps):
            step()
        machine.synchronize()
        graphs_after_warm_up, peak = runtime.compiled_graphs() - graphs, machine.peak_memory_bytes()
        seconds = [end.seconds_since(before) for before, end in pairwise(ends[warm_up - 1 :])]
        found = breakdown(step, machine) if profiled else None
    spans = [batch.attended_length for batch in next(_random_steps(config))]
    flops = flops_per_token(config.model, statistics.fmean(spans))
    return Trial(
        kernel=alone.transformer.kernel(machine.device, masked=config.data.mask_documents),
        swiglu="quack" if alone.transformer.in_epilogue else "own",
        tokens_per_step=tokens,
        seconds=seconds,
        first_seconds=first_seconds,
        losses=(stats[0].read()[0], stats[-1].read()[0]),
        graphs_after_warm_up=graphs_after_warm_up,
        peak_bytes=peak,
        predicted=predicted_memory(config, split),
        mfu=model_flops_utilisation(tokens / statistics.median(seconds), flops, machine.peak_flops, world.size),
        breakdown=found,
    )


def random_model(config: RunConfig, machine: Machine, split: Split = ALONE, context: Context | None = None) -> TrainingModel:
    """Return the model of ``config`` on the device, with random weights drawn there, the same at each call."""
    transformer = transformer_for(config, machine, Kernels(config.model.attention, swiglu_kernel(config, machine)[0]), split, context)
    torch.manual_seed(config.train.seed)
    with torch.no_grad():
        for weight in transformer.parameters():
            _ = weight.fill_(1.0) if weight.ndim == 1 else weight.normal_(0.0, 0.02)
    if config.train.compile and runtime.can_compile(machine) is None:
        transformer.compile_blocks()
    return TrainingModel(transformer, z_loss=config.train.z_loss, chunk=config.train.loss_chunk)


def _random_steps(config: RunConfig, rank: int = 0) -> Iterator[list[Batch]]:
    """Return the micro-batches of step after step, the same at each call."""
    train = config.train
    assert isinstance(train.batch_size, int)
    random = np.random.default_rng(rank)
    while True:
        rows = random.integers(UNK + 1, config.model.vocab_size, (train.grad_accum, train.batch_size, train.seq_len + 1))
        rows[:, :, DOCUMENT_TOKENS - 1 :: DOCUMENT_TOKENS] = EOS
        yield [Batch.of_rows(part, mask_documents=config.data.mask_documents) for part in rows]
