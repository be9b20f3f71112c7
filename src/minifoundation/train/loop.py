"""The training loop: steps, and now and then an evaluation or a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from minifoundation.checkpoint import step_folder
from minifoundation.data.batch import Batch
from minifoundation.errors import UserError
from minifoundation.model.size import flops_per_token
from minifoundation.runtime import Moment, collector_held, compiled_graphs
from minifoundation.train.feed import Feed, NoData
from minifoundation.train.guard import GOOD, OVERFLOW, REASONS
from minifoundation.train.metrics import MetricsLog, Row, bits_per_byte, model_flops_utilisation
from minifoundation.train.rollback import Bad
from minifoundation.train.schedule import learning_rate
from minifoundation.train.state import Training
from minifoundation.train.step import Figures, StepStats, held_out_loss, settle, train_step
from minifoundation.train.stop import Stop


@dataclass
class _Pending:
    """A step whose figures have not been read from the device yet."""

    step: int
    sample: int
    """The first of the step."""
    lr: float
    stats: StepStats
    wait_seconds: float
    done: Moment


class _Diverged(Exception):
    """Too many steps in a row were skipped."""

    def __init__(self, bad: Bad) -> None:
        self.bad = bad


def fit(training: Training, log: MetricsLog, stop: Stop) -> Literal["finished", "stopped"] | Bad:
    """Train from ``training.progress`` to the end of the plan, or until told to stop and saved, or until nothing is learnt any more.

    On a GPU a step's figures are read after the next step has been launched, so the device never waits for Python.

    Raises:
        UserError: shards cannot be made or read, and the run was saved; or a checkpoint could not be written.
    """
    report = _Report(training, log)
    feed = Feed(training, lambda: stop.asked, report.bar)
    with report.bar, collector_held() as collect, training.watch.watching():
        try:
            return _fit(training, feed, report, stop, collect)
        except _Diverged as diverged:
            return diverged.bad


def _fit(training: Training, feed: Feed, report: _Report, stop: Stop, collect: Callable[[], None]) -> Literal["finished", "stopped"]:
    try:
        if not _made_up(training, feed, report, stop):
            _save_here(training)
            return "stopped"
        report.raise_fault()
        with feed.open() as steps:
            outcome = _train(training, feed, steps, report, stop, collect)
        report.raise_fault()
        return outcome
    except NoData as lack:
        training.watch.rest()  # writing may take its time
        report.catch_up()
        if lack.everywhere or training.world.size == 1:  # else the others are in a step, and cannot save with this one
            report.raise_fault()
            _save_here(training)
        if lack.error is not None:
            raise lack.error from None
        return "stopped"


def _save_here(training: Training) -> None:
    """Save, unless the run stands where it went on from in its folder, and return when that is written and all processes are here."""
    here = step_folder(training.config.out_dir, training.progress.step)
    if not training.world.agreed(here.exists):
        training.save()
    with training.world.together():
        training.saver.finish()


def _made_up(training: Training, feed: Feed, report: _Report, stop: Stop) -> bool:
    """Do the evaluation that a stop has cut short, write the row that waits for it, and return whether this was not cut short too."""
    progress = training.progress
    if progress.due is None:
        return True
    if not _evaluated(training, feed, stop, progress.due):
        return False
    report.add(progress.due)
    progress.due = None
    return True


def _due(training: Training, step: int) -> tuple[bool, bool]:
    """Return whether the held-out loss, and the benchmarks, are to be had after ``step``; both are after the last one."""
    config, last = training.config, step == training.plan.steps
    every = config.eval.every_steps
    return last or step % config.train.eval_every == 0, training.suite is not None and every is not None and (last or step % every == 0)


def _evaluated(training: Training, feed: Feed, stop: Stop, row: Row) -> bool:
    """Do what is due after the step of ``row``, add it there, and return whether that came to its end: not when told to stop."""
    held_out_due, suite_due = _due(training, row["step"])
    if held_out_due:
        feed.wait_for_held_out()
        held_out = training.held_out
        if training.supply is not None and row["step"] <= training.config.train.eval_every:  # now the rows are known
            for line in held_out.lacking():
                training.say(line)
        if held_out.batches:
            nats = held_out_loss(training.model, held_out.batches, training.world, training.machine.device, lambda: stop.asked)
            if nats is None:
                return False
            training.progress.held_out_bits_per_byte = row["held_out_bits_per_byte"] = bits_per_byte(nats, held_out.bytes_per_token)
    if suite_due:
        scores = training.scores(lambda: stop.asked)
        if scores is None:
            return False
        row.update(scores)
        shown = (f"{name.removeprefix('eval/')} {'not run' if score is None else f'{score:.1%}'}" for name, score in scores.items())
        training.say(f"step {row['step']:,}: {', '.join(shown)}")
    return True


def _train(
    training: Training, feed: Feed, steps: Iterator[list[Batch]], report: _Report, stop: Stop, collect: Callable[[], None]
) -> Literal["finished", "stopped"]:
    config, plan, progress = training.config.train, training.plan, training.progress
    world, machine, saver = training.world, training.machine, training.saver
    stop.nothing_to_save = world.size == 1  # several processes leave together, at the same step
    scales, first = training.transformer.scales, progress.step + 1
    while progress.step < plan.steps:
        if progress.step > first:  # the first steps compile
            training.watch.turn()
        started = time.perf_counter()
        micro = next(steps)
        waited = time.perf_counter() - started
        report.attempt(saver.check)
        rate = learning_rate(progress.step, plan.steps, config)
        torch.manual_seed(_dropout_seed(config.seed, progress.step, world.rank))
        graphs = compiled_graphs()
        settle(training.model, scales, micro[0], tokens=plan.tokens_per_step, world=world)
        stats = train_step(
            training.model,
            training.optimizer,
            training.scaler,
            micro,
            lr=rate,
            grad_clip=config.grad_clip,
            tokens=plan.tokens_per_step,
            world=world,
            stop=stop.asked or report.fault is not None,
            guard=training.guard,
            hold=saver.hold,
            scales=scales,
        )
        sample = progress.place(plan.samples_per_step)
        progress.step += 1
        progress.sample = sample + plan.samples_per_step
        progress.tokens += plan.tokens_per_step
        if training.average is not None:
            training.average.update(progress.step, stats.taken)
        if progress.step == first:
            collect()  # all that compiling has left
        elif compiled_graphs() > graphs:
            training.say(
                f"warning: train.compile: step {progress.step} was compiled again, which costs seconds; TORCH_LOGS=recompiles says why"
            )
        before = report.catch_up()
        now = report.pending = _Pending(progress.step, sample, rate, stats, waited, Moment(machine))
        stop.nothing_to_save = False
        known = before if machine.is_cuda else now  # the newest step whose figures can be read without waiting
        last = progress.step == plan.steps
        evaluating = any(_due(training, progress.step))
        saving = not last and progress.step % config.save_every == 0
        alone = stop.asked or report.fault is not None
        told = alone if world.size == 1 else known is not None and known.stats.read().stop  # the same on every process
        stopping = told and not last
        if evaluating or saving or stopping or not machine.is_cuda:
            figures = report.read(now)
            if evaluating or saving or stopping:
                training.watch.rest()
                report.raise_fault()
            if evaluating:
                progress.due = figures
                if _evaluated(training, feed, stop, figures):
                    progress.due = None
                else:
                    stopping = True
            if progress.due is None:
                report.write(figures, evaluated=evaluating)
            if saving or stopping:
                training.save()
            if stopping:
                with world.together():  # so that none leaves while the first one writes
                    saver.finish()
            if evaluating or saving:
                collect()
            report.resume_clock()
        if stopping:
            return "stopped"
    return "finished"


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
        self.fault: UserError | OSError | None = None
        """What this process could not write; all of them stop for it, at the same step."""

    def attempt(self, write: Callable[[], None]) -> None:
        """Do what raises the fault of a file, and keep that until ``raise_fault``: the other processes may be in a step."""
        try:
            write()
        except (UserError, OSError) as error:
            self.fault = self.fault or error

    def raise_fault(self) -> None:
        """Raise what a process could not write, on every process, all of which call this."""
        with self.training.world.together():
            if self.fault is not None:
                raise self.fault

    def resume_clock(self) -> None:
        """Leave the time of an evaluation or a save out of the next figures."""
        self.before = Moment(self.training.machine)

    def catch_up(self) -> _Pending | None:
        """Read and write the figures that are pending, and return whose they were.

        Raises:
            _Diverged: as ``read``.
        """
        pending = self.pending
        if pending is not None:
            self.write(self.read(pending), evaluated=False)
        return pending

    def read(self, pending: _Pending) -> Row:
        """Return the figures of a step; this waits until the device has done it.

        Raises:
            _Diverged: as many steps in a row as ``train.max_skips`` were skipped.
        """
        self.pending = None
        found = pending.stats.read()
        if found.verdict == GOOD:
            self.training.progress.skipped_in_a_row = 0
        else:
            self._skipped(pending, found)
        plan, machine = self.training.plan, self.training.machine
        rate = plan.tokens_per_step / pending.done.seconds_since(self.before)
        self.before = pending.done
        flops = flops_per_token(self.training.config.model, pending.stats.attended_length)
        return {
            "step": pending.step,
            "tokens": pending.step * plan.tokens_per_step,
            "loss": found.loss,
            "z_loss": found.z_loss,
            "held_out_bits_per_byte": None,
            "lr": pending.lr,
            "grad_norm": found.grad_norm,
            "tokens_per_second": rate,
            "mfu": model_flops_utilisation(rate, flops, machine.peak_flops, self.training.world.size),
            "peak_memory_gib": machine.peak_memory_bytes() / 2**30,
            "data_wait_seconds": pending.wait_seconds,
            "cut_off": found.cut_off if self.training.transformer.scales is not None else None,
            "skipped": REASONS.get(found.verdict),
        }

    def _skipped(self, pending: _Pending, found: Figures) -> None:
        """Tell of a step that changed nothing, and count it."""
        training, reason = self.training, REASONS[found.verdict]
        progress, end = training.progress, pending.sample + training.plan.samples_per_step
        seen = f"{reason} (loss {found.loss:.4g}, gradient norm {found.grad_norm:.4g}"
        if "spike" in reason:
            seen += f"; {max(found.loss_deviations, found.norm_deviations):.0f} robust standard deviations above the median"
        seen += ")"
        training.say(f"step {pending.step:,} skipped: {seen}; samples {pending.sample:,} to {end - 1:,}")
        if found.verdict == OVERFLOW:
            return
        progress.skipped.append({"step": pending.step, "first_sample": pending.sample, "end": end, "reason": reason})
        progress.skipped_in_a_row += 1
        row = progress.skipped[-progress.skipped_in_a_row :]
        if len(row) >= training.config.train.max_skips:
            raise _Diverged(Bad(row[0]["step"], pending.step, row[0]["first_sample"], end, seen))

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
        if evaluated or figures["skipped"] or figures["step"] % self.training.config.train.log_every == 0:
            self.add(figures)

    def add(self, row: Row) -> None:
        """Add a row to metrics.csv; where that fails, ``train.if_save_fails`` says what follows."""
        try:
            self.log.write(row)
        except OSError as error:
            self.attempt(partial(self.training.saver.failed, error))
