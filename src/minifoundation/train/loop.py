"""The training loop: steps, and now and then an evaluation or a checkpoint."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from minifoundation.config import TrainConfig
from minifoundation.data.batch import Batch, prefetch
from minifoundation.data.loader import Loader, micro_batches
from minifoundation.distributed import World
from minifoundation.errors import UserError
from minifoundation.runtime import Machine, Moment
from minifoundation.train.ema import Average
from minifoundation.train.metrics import MetricsLog, Row, bits_per_byte, model_flops_utilisation
from minifoundation.train.plan import Plan
from minifoundation.train.schedule import learning_rate
from minifoundation.train.step import StepStats, held_out_loss, train_step


@dataclass
class Progress:
    """How far a phase has come: the one mutable object of the loop."""

    step: int = 0
    tokens: int = 0
    sample: int = 0
    """The place in the data: the next sample of this phase."""
    first_shard: int = 0
    """The shard at which the phase began to read."""
    phase: str = "pretrain"
    held_out_bits_per_byte: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class HeldOut:
    """The held-out batches and the bytes of text that a token of them stands for."""

    batches: Sequence[Batch]
    bytes_per_token: float


@dataclass
class _Pending:
    """A step whose figures have not been read from the device yet."""

    step: int
    lr: float
    stats: StepStats
    wait_seconds: float
    done: Moment


class Stop:
    """Set by SIGINT and SIGTERM; a second signal ends the process at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write(f"{signal.Signals(number).name}: saving after this step (once more to stop at once)")


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Yield a flag that SIGINT or SIGTERM sets, and put the former handlers back at the end."""
    stop = Stop()
    former = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: Average | None,
    loader: Loader,
    held_out: HeldOut | None,
    *,
    config: TrainConfig,
    plan: Plan,
    progress: Progress,
    machine: Machine,
    world: World,
    log: MetricsLog,
    save: Callable[[], None],
    stop: Stop,
) -> bool:
    """Train from ``progress`` to the end of ``plan`` and return whether the end was reached (False: told to stop, and saved).

    On a GPU a step's figures are read after the next step has been launched, so the device never waits for Python.

    Raises:
        UserError: the loss is not a finite number.
    """
    assert isinstance(config.batch_size, int)
    report = _Report(config, plan, progress, machine, world, log)
    rows = range(progress.sample, progress.sample + (plan.steps - progress.step) * plan.samples_per_step, plan.samples_per_step)
    data = (
        list(
            micro_batches(loader, first, batch_size=config.batch_size, grad_accum=config.grad_accum, rank=world.rank, world_size=world.size)
        )
        for first in rows
    )
    pending: _Pending | None = None
    with report.bar, prefetch(data, pin=machine.is_cuda) as batches:
        while progress.step < plan.steps:
            started = time.perf_counter()
            micro = [_to(batch, machine) for batch in next(batches)]
            waited = time.perf_counter() - started
            rate = learning_rate(progress.step, plan.steps, config)
            torch.manual_seed(_dropout_seed(config.seed, progress.step, world.rank))
            stats = train_step(
                model,
                optimizer,
                scaler,
                micro,
                lr=rate,
                grad_clip=config.grad_clip,
                tokens=plan.tokens_per_step,
                world=world,
                stop=stop.asked,
            )
            progress.step += 1
            progress.sample += plan.samples_per_step
            progress.tokens += plan.tokens_per_step
            if average is not None:
                average.update(progress.step)
            if pending is not None:
                report.write(report.read(pending), evaluated=False)
            before, pending = pending, _Pending(progress.step, rate, stats, waited, Moment(machine))
            known = before if machine.is_cuda else pending  # the newest step whose figures can be read without waiting
            last = progress.step == plan.steps
            evaluating = last or progress.step % config.eval_every == 0
            saving = not last and progress.step % config.save_every == 0
            told = stop.asked if world.size == 1 else known is not None and known.stats.read()[-1]  # the same on every process
            stopping = told and not last
            if evaluating or saving or stopping or not machine.is_cuda:
                figures = report.read(pending)
                pending = None
                if evaluating and held_out is not None:
                    nats = held_out_loss(model, held_out.batches, world, machine.device)
                    progress.held_out_bits_per_byte = bits_per_byte(nats, held_out.bytes_per_token)
                report.write(figures, evaluated=evaluating)
                if saving or stopping:
                    save()
                report.resume_clock()
            if stopping:
                return False
    return True


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    """Return a seed that depends on nothing but its arguments, so that no generator's state needs to be saved."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


def _to(batch: Batch, machine: Machine) -> Batch:
    return Batch(batch.tokens.to(machine.device, non_blocking=True), batch.targets.to(machine.device, non_blocking=True))


class _Report:
    """Turns the figures of steps into the progress line and rows of metrics.csv."""

    def __init__(
        self,
        config: TrainConfig,
        plan: Plan,
        progress: Progress,
        machine: Machine,
        world: World,
        log: MetricsLog,
    ) -> None:
        self.config, self.plan, self.progress, self.machine, self.world, self.log = config, plan, progress, machine, world, log
        self.bar = tqdm(
            total=plan.steps, initial=progress.step, desc=progress.phase, unit="step", disable=not world.is_first, dynamic_ncols=True
        )
        self.before = Moment(machine)

    def resume_clock(self) -> None:
        """Leave the time of an evaluation or a save out of the next figures."""
        self.before = Moment(self.machine)

    def read(self, pending: _Pending) -> Row:
        """Return the figures of a step; this waits until the device has done it.

        Raises:
            UserError: the loss is not a finite number.
        """
        loss, z_loss, norm, _ = pending.stats.read()
        if not math.isfinite(loss):
            raise UserError(
                "train.lr",
                f"the loss became {loss} at step {pending.step} with rate {pending.lr:.3g}",
                "start again in another --out_dir with a lower --lr, a longer --train.warmup, or bf16 instead of fp16",
            )
        rate = self.plan.tokens_per_step / pending.done.seconds_since(self.before)
        self.before = pending.done
        return {
            "step": pending.step,
            "tokens": self.progress.tokens - (self.progress.step - pending.step) * self.plan.tokens_per_step,
            "loss": loss,
            "z_loss": z_loss,
            "held_out_bits_per_byte": None,
            "lr": pending.lr,
            "grad_norm": norm,
            "tokens_per_second": rate,
            "mfu": model_flops_utilisation(rate, self.plan.flops_per_token, self.machine.peak_flops, self.world.size),
            "peak_memory_gib": self.machine.peak_memory_bytes() / 2**30,
            "data_wait_seconds": pending.wait_seconds,
        }

    def write(self, figures: Row, *, evaluated: bool) -> None:
        """Move the progress line on and add a row to metrics.csv; an evaluation of this step goes with it."""
        bits, mfu = self.progress.held_out_bits_per_byte, figures["mfu"]
        shown = {"loss": f"{figures['loss']:.3f}"}
        if bits is not None:
            shown["bpb"] = f"{bits:.3f}"
        shown |= {"lr": f"{figures['lr']:.2e}", "tok/s": f"{figures['tokens_per_second']:,.0f}"}
        if mfu is not None:
            shown["MFU"] = f"{mfu:.1%}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(1)
        if evaluated or figures["step"] % self.config.log_every == 0:
            self.log.write({**figures, "held_out_bits_per_byte": bits if evaluated else None})
