"""The training loop: steps, and now and then an evaluation or a checkpoint."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import numpy as np
import torch
from tqdm import tqdm

from minifoundation.data.batch import Batch
from minifoundation.errors import UserError
from minifoundation.model.size import flops_per_token
from minifoundation.runtime import Moment, collector_held, compiled_graphs
from minifoundation.train.feed import Feed, NoData
from minifoundation.train.metrics import MetricsLog, Row, bits_per_byte, model_flops_utilisation
from minifoundation.train.schedule import learning_rate
from minifoundation.train.state import Training
from minifoundation.train.step import StepStats, held_out_loss, train_step


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


def fit(training: Training, log: MetricsLog, stop: Stop) -> bool:
    """Train from ``training.progress`` to the end of the plan and return whether the end was reached (False: told to stop, and saved).

    On a GPU a step's figures are read after the next step has been launched, so the device never waits for Python.

    Raises:
        UserError: the loss is not a finite number; or shards cannot be made or read, and the run was saved.
    """
    report = _Report(training, log)
    feed = Feed(training, lambda: stop.asked, report.bar)
    with report.bar, collector_held() as collect:
        try:
            with feed.open() as steps:
                return _train(training, feed, steps, report, stop, collect)
        except NoData as lack:
            report.catch_up()
            training.save()
            if lack.everywhere:
                training.world.wait()
            if lack.error is not None:
                raise lack.error from None
            return False


def _train(training: Training, feed: Feed, steps: Iterator[list[Batch]], report: _Report, stop: Stop, collect: Callable[[], None]) -> bool:
    config, plan, progress = training.config.train, training.plan, training.progress
    world, machine = training.world, training.machine
    first = progress.step + 1
    while progress.step < plan.steps:
        started = time.perf_counter()
        micro = next(steps)
        waited = time.perf_counter() - started
        rate = learning_rate(progress.step, plan.steps, config)
        torch.manual_seed(_dropout_seed(config.seed, progress.step, world.rank))
        graphs = compiled_graphs()
        stats = train_step(
            training.model,
            training.optimizer,
            training.scaler,
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
        if training.average is not None:
            training.average.update(progress.step)
        if progress.step == first:
            collect()  # all that compiling has left
        elif compiled_graphs() > graphs and world.is_first:
            warning = (
                f"warning: train.compile: step {progress.step} was compiled again, which costs seconds; TORCH_LOGS=recompiles says why"
            )
            tqdm.write(warning, file=sys.stderr)
        before = report.catch_up()
        now = report.pending = _Pending(progress.step, rate, stats, waited, Moment(machine))
        known = before if machine.is_cuda else now  # the newest step whose figures can be read without waiting
        last = progress.step == plan.steps
        evaluating = last or progress.step % config.eval_every == 0
        saving = not last and progress.step % config.save_every == 0
        told = stop.asked if world.size == 1 else known is not None and known.stats.read()[-1]  # the same on every process
        stopping = told and not last
        if evaluating or saving or stopping or not machine.is_cuda:
            if evaluating:
                feed.wait_for_held_out()
            figures = report.read(now)
            if evaluating and training.held_out.batches:
                nats = held_out_loss(training.model, training.held_out.batches, world, machine.device)
                progress.held_out_bits_per_byte = bits_per_byte(nats, training.held_out.bytes_per_token)
            report.write(figures, evaluated=evaluating)
            if saving or stopping:
                training.save()
                world.wait()  # so that none leaves while the first one writes
            if evaluating or saving:
                collect()
            report.resume_clock()
        if stopping:
            return False
    return True


def _dropout_seed(seed: int, step: int, rank: int) -> int:
    """Return a seed that depends on nothing but its arguments, so that no generator's state needs to be saved."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])


class _Report:
    """Turns the figures of steps into the progress line and rows of metrics.csv."""

    def __init__(self, training: Training, log: MetricsLog) -> None:
        self.training, self.log = training, log
        progress = training.progress
        self.bar = tqdm(
            total=training.plan.steps,
            initial=progress.step,
            desc=progress.phase,
            unit="step",
            disable=not training.world.is_first,
            dynamic_ncols=True,
        )
        self.before = Moment(training.machine)
        self.pending: _Pending | None = None
        """The step whose figures are still to be read and written."""

    def resume_clock(self) -> None:
        """Leave the time of an evaluation or a save out of the next figures."""
        self.before = Moment(self.training.machine)

    def catch_up(self) -> _Pending | None:
        """Read and write the figures that are pending, and return whose they were."""
        pending = self.pending
        if pending is not None:
            self.write(self.read(pending), evaluated=False)
        return pending

    def read(self, pending: _Pending) -> Row:
        """Return the figures of a step; this waits until the device has done it.

        Raises:
            UserError: the loss is not a finite number.
        """
        self.pending = None
        loss, z_loss, norm, _ = pending.stats.read()
        if not math.isfinite(loss):
            raise UserError(
                "train.lr",
                f"the loss became {loss} at step {pending.step} with rate {pending.lr:.3g}",
                "start again in another --out_dir with a lower --lr, a longer --train.warmup, or bf16 instead of fp16",
            )
        plan, machine = self.training.plan, self.training.machine
        rate = plan.tokens_per_step / pending.done.seconds_since(self.before)
        self.before = pending.done
        flops = flops_per_token(self.training.config.model, pending.stats.attended_length)
        return {
            "step": pending.step,
            "tokens": pending.step * plan.tokens_per_step,
            "loss": loss,
            "z_loss": z_loss,
            "held_out_bits_per_byte": None,
            "lr": pending.lr,
            "grad_norm": norm,
            "tokens_per_second": rate,
            "mfu": model_flops_utilisation(rate, flops, machine.peak_flops, self.training.world.size),
            "peak_memory_gib": machine.peak_memory_bytes() / 2**30,
            "data_wait_seconds": pending.wait_seconds,
        }

    def write(self, figures: Row, *, evaluated: bool) -> None:
        """Move the progress line on and add a row to metrics.csv; an evaluation of this step goes with it."""
        bits, mfu = self.training.progress.held_out_bits_per_byte, figures["mfu"]
        shown = {"loss": f"{figures['loss']:.3f}"}
        if bits is not None:
            shown["bpb"] = f"{bits:.3f}"
        shown |= {"lr": f"{figures['lr']:.2e}", "tok/s": f"{figures['tokens_per_second']:,.0f}"}
        if mfu is not None:
            shown["MFU"] = f"{mfu:.1%}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(1)
        if evaluated or figures["step"] % self.training.config.train.log_every == 0:
            self.log.write({**figures, "held_out_bits_per_byte": bits if evaluated else None})
