"""One phase of training from settings to ``final.pth``: pretrain and longft share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from minifoundation import runtime
from minifoundation.checkpoint import FINAL, Checkpoint, Saver, load_checkpoint, save_final, step_folder, step_folders, tidy, write_whole
from minifoundation.config import RunConfig, changed, to_yaml
from minifoundation.data.supply import Supply
from minifoundation.distributed import World, join, sharing_rows
from minifoundation.errors import Interrupted, Stopped, UserError, refuse_unwritable
from minifoundation.lock import held
from minifoundation.runtime import Machine
from minifoundation.train.construction import built
from minifoundation.train.corpus import (
    TrainingData,
    described,
    given_tokenizer,
    refuse_absent,
    run_tokenizer,
    training_data,
    with_vocabulary,
)
from minifoundation.train.fallbacks import supported
from minifoundation.train.finder import rows_left_open, steps_fit, with_batch_size
from minifoundation.train.kernels import chosen_kernels
from minifoundation.train.loop import fit
from minifoundation.train.meeting import network, same_data, same_run
from minifoundation.train.metrics import METRICS, MetricsLog
from minifoundation.train.out_of_memory import is_out_of_memory, refuse_too_large, too_large
from minifoundation.train.parallel import accumulated, as_asked, chosen_split
from minifoundation.train.plan import Plan, describe, micro_batch, plan
from minifoundation.train.printer import Printer, Say
from minifoundation.train.provenance import record_start, typed
from minifoundation.train.resume import checkpoint_to_resume, refuse_another_run, refuse_used, set_others_aside
from minifoundation.train.rollback import Bad, checkpoint_before, record_rollback, stepped_over
from minifoundation.train.state import Phase, Progress, Start
from minifoundation.train.stop import Stop, stop_on_signals
from minifoundation.train.suite import Suite
from minifoundation.wording import micro_batches


def run(
    config: RunConfig,
    *,
    resume: str | None,
    dry_run: bool,
    allowed: tuple[str, ...] = (),
    start: Start | None = None,
    suite_for: Callable[[RunConfig], Suite | None] = lambda _: None,
) -> Path | None:
    """Train one phase and return the path of its ``final.pth`` (None for a dry run).

    Args:
        resume: ``auto`` or the path of a checkpoint; None refuses a folder that holds a run.
        allowed: settings that may differ from the checkpoint's although they change the result.
        start: the checkpoint whose weights and tokenizer a later phase starts from.
        suite_for: returns the benchmarks that a run does on its weights, None for none.

    Raises:
        UserError: anything in the settings, files or device that cannot work.
        Stopped: told to stop; saved, with the line that goes on.
        Interrupted: told to stop while there was nothing to save.
    """
    with join() as world, stop_on_signals(config.train.max_hours) as stop, ExitStack() as owned:
        say = Printer(world)
        same_run(config, world)
        try:
            if not dry_run:  # before a checkpoint is chosen: until the folder is ours another process may write a later one
                world.agreed(lambda: owned.enter_context(_owned(config.out_dir)))
            return _run(config, world, stop, say, resume=resume, dry_run=dry_run, allowed=allowed, start=start, suite_for=suite_for)
        except KeyboardInterrupt:
            if stop.nothing_to_save:
                there = "nothing is lost" if step_folders(config.out_dir) else "no step was done yet"
                raise Interrupted(f"stopped ({there}); continue with: {typed(world, **_going_on(config, resume))}") from None
            raise


def _run(
    config: RunConfig,
    world: World,
    stop: Stop,
    say: Say,
    *,
    resume: str | None,
    dry_run: bool,
    allowed: tuple[str, ...],
    start: Start | None,
    suite_for: Callable[[RunConfig], Suite | None],
) -> Path | None:
    machine = runtime.machine(world.local_rank)
    # What fits the smallest of the devices fits all of them, and no process finds other rows than the others.
    machine = replace(machine, memory_bytes=min(world.of_all(machine.memory_bytes)))
    with world.together():
        world = sharing_rows(world, config.train.context_parallel)
        asked = accumulated(supported(config, machine, say), world)
    with world.together():
        path, resumed = checkpoint_to_resume(config.out_dir, resume, world, say)
    before = resumed or (start.checkpoint if start else None)
    asked = world.agreed(lambda: with_vocabulary(asked, before, None if before else given_tokenizer(asked, say), say))
    if resumed is not None:
        asked = _with_rows_of(resumed, asked, world)
    config, planned = _planned(asked, machine, world, say, by_trial=False)
    if resumed is not None and path is not None:
        with world.together():
            refuse_another_run(resumed, config, allowed, planned, path, say)
    moments = _has_moments(config, resumed, start)
    if dry_run:
        world.agreed(lambda: _dry_run(config, planned, machine, world, say, moments=moments, begins=resume is None))
        return None
    world.agreed(lambda: refuse_too_large(config, machine, world, planned.split, moments=moments))
    if resumed is not None and resumed.progress["step"] >= planned.steps and not resumed.optimizer:
        say(f"{path} is finished: {planned.steps:,} of {planned.steps:,} steps; to train it further begin with --init_from {path}")
        return path
    if resume is None:
        world.agreed(lambda: refuse_used(config.out_dir))
    try:
        if resumed is not None and path is not None:
            world.agreed(partial(set_others_aside, config.out_dir, path, resumed.progress["step"], say))
        with world.together():
            suite = suite_for(config)
        # Once more: a tokenizer that is trained now may have fewer pieces than were asked for, and steps of the real model show what fits.
        asked = world.agreed(lambda: with_vocabulary(asked, before, run_tokenizer(asked, before), say))
        config, planned = _planned(asked, machine, world, say, by_trial=True)
        phase = Phase(config, planned, machine, world, start, suite, say)
        return _trained(phase, stop, path=path, resumed=resumed)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        begun = bool(step_folders(config.out_dir)) or (config.out_dir / METRICS).exists()
        going_on = _going_on(config, resume) if begun else {}
        moments = _has_moments(config, resumed, start)
        fault = too_large(config, machine, world, split=planned.split, going_on=going_on, moments=moments)
    raise fault  # outside the handler, so that what the device held for the step is free


def _planned(asked: RunConfig, machine: Machine, world: World, say: Say, *, by_trial: bool) -> tuple[RunConfig, Plan]:
    """Return the settings of the run that is ``asked`` for, with the rows that fit, and its plan; the same on every process.

    Args:
        by_trial: with ``batch_size: auto`` real steps show what fits, and it is told; else what is predicted to fit is taken for it.

    Raises:
        UserError: the processes cannot share such a model, not even one row fits, or there are fewer tokens than one step takes.
    """
    split = world.agreed(lambda: chosen_split(asked, machine, world))

    def fits(one: RunConfig) -> bool:
        return not by_trial or steps_fit(one, machine, world, say, split)

    with world.together():
        config = with_batch_size(asked, machine, fits, split)
        if by_trial and asked.train.batch_size == "auto":
            say(f"train.batch_size: auto is {micro_batch(config.train)} x {micro_batches(config.train.grad_accum)}")
        return config, plan(config, world.size, split)


def _dry_run(config: RunConfig, planned: Plan, machine: Machine, world: World, say: Say, *, moments: bool, begins: bool) -> None:
    """Print the plan of a run that is not started, and refuse what cannot work of it, as far as this is known without starting."""
    print(f"plan of {config.out_dir}:\n{describe(config, planned, machine, world.size)}\nnothing was started (--dry_run)")
    refuse_too_large(config, machine, world, planned.split, moments=moments, planned=True)
    if planned.memory_total > machine.memory_bytes:
        say(f"warning: {machine.name} has less memory than that: a run is refused here")
    refuse_absent(config)
    refuse_unwritable("out_dir", config.out_dir, config.out_dir, "give another folder")
    if begins:
        refuse_used(config.out_dir)


def _going_on(config: RunConfig, resume: str | None) -> dict[str, str]:
    """Return the option with which the same line goes on: the path that was typed stays until the run has saved something itself."""
    typed_path = resume not in (None, "auto") and not step_folders(config.out_dir)
    return {} if typed_path else {"resume": "auto"}


def _has_moments(config: RunConfig, resumed: Checkpoint | None, start: Start | None) -> bool:
    """Return whether the run, or the line that goes on with it, has its optimizer's moments from a checkpoint."""
    carried = start is not None and start.with_optimizer
    return carried or resumed is not None or bool(step_folders(config.out_dir))


@contextmanager
def _owned(out_dir: Path) -> Iterator[None]:
    """Hold the folder of the run, and remove what a killed one has left half-written in it."""
    with held(out_dir):
        tidy(out_dir)
        yield


def _trained(phase: Phase, stop: Stop, *, path: Path | None, resumed: Checkpoint | None) -> Path:
    """Train to the end and return ``final.pth``, going back to a checkpoint as often as that is needed and allowed.

    Args:
        path: where ``resumed`` lies, perhaps in another folder than the run's own.
    """
    again = False
    while True:
        outcome = _train(phase, stop, resumed=resumed, again=again)
        if isinstance(outcome, Path):
            return outcome
        folder = phase.world.agreed(partial(_gone_back, outcome, phase, path))
        resumed = load_checkpoint(folder, verified=True) if folder else None
        torch.compiler.reset()
        phase.machine.forget()  # a model that is split lies in a cycle, and there is no room for two
        again = True


def _gone_back(bad: Bad, phase: Phase, path: Path | None) -> Path | None:
    """Return the checkpoint that the run, which went on from ``path``, goes back to, once its folder says so; None for the beginning."""
    out_dir = phase.config.out_dir
    folder = checkpoint_before(bad, out_dir, path, most=phase.config.train.max_rollbacks, say=phase.say)
    phase.say(f"going back to {folder or 'the beginning'}, and over what was skipped: {bad}")
    record_rollback(bad, folder, out_dir)
    return folder


def _with_rows_of(resumed: Checkpoint, asked: RunConfig, world: World) -> RunConfig:
    """Return ``asked`` with the rows a step that the run has; with ``batch_size: auto`` only how many fit at once is found anew."""
    rows = max(1, resumed.progress["samples_per_step"] // world.dp_size)
    return asked.replaced(train={"grad_accum": rows}) if rows_left_open(asked) else asked


def _train(phase: Phase, stop: Stop, *, resumed: Checkpoint | None, again: bool) -> Path | Bad:
    """Train from ``resumed`` or the beginning, and return ``final.pth``, or the steps from which nothing could be learnt.

    Args:
        again: the plan has been told before.

    Raises:
        Stopped: told to stop; saved.
    """
    config, planned, machine, world, say = phase.config, phase.plan, phase.machine, phase.world, phase.say
    out_dir = config.out_dir
    left_out = world.agreed(lambda: stepped_over(out_dir))  # another machine may not see yet what the first one has just written
    data = training_data(config, planned, world, say, resumed=resumed, start=phase.start, stepped_over=left_out)
    same_data(data.loader, data.progress.sample, world)
    if not again:
        _tell(phase, data)
        for line in network(machine, world):
            say(line)
    kernels, choices = chosen_kernels(config, machine, world, resumed.kernels if resumed else {})
    for choice in [] if again else choices:
        say(choice)
    background = Supply(data.to_make, config.data, data.tokenizer.path) if data.to_make and world.is_first else nullcontext()
    with background as supply, _saver(config, say) as saver:
        training = built(phase, data, kernels=kernels, supply=supply, saver=saver, resumed=resumed)
        progress = data.progress
        if resumed is not None:
            resumed.let_go()
        with _log(phase, progress) as log:
            outcome = fit(training, log, stop)
        if isinstance(outcome, Bad):
            return outcome
        if outcome == "stopped":
            world.agreed(lambda: _refuse_unsaved(out_dir, progress.step, f"{stop.reason}: stopped at step {progress.step:,}"))
            raise Stopped(
                f"{stop.reason}: stopped at step {progress.step:,} of {planned.steps:,} and saved {out_dir}; "
                f"continue with: {typed(world, resume='auto')}"
            )
        with world.together():
            saver.finish()
        path = out_dir / FINAL
        checkpoint = training.checkpoint(with_optimizer=False)
        if planned.split.optimizer_shards > 1:
            checkpoint = checkpoint.in_host_memory(kept=world.is_first)
        world.agreed(lambda: save_final(checkpoint, out_dir))
        say(f"wrote {path} (metrics: {out_dir / METRICS}, settings: {out_dir / 'config.yaml'})")
        return path


def _refuse_unsaved(out_dir: Path, step: int, told: str) -> None:
    """Refuse to say that a stopped run is saved when it is not; why was said, where ``train.if_save_fails`` is continue.

    Raises:
        UserError: there is no checkpoint of ``step``.
    """
    if not step_folder(out_dir, step).exists():
        last = step_folders(out_dir)
        since = f"--resume auto goes on from {last[-1].name}" if last else "there is none to go on from"
        raise UserError(str(out_dir), f"{told}, which could not be saved", since)


def _tell(phase: Phase, data: TrainingData) -> None:
    """Print the plan, and warn of what it needs more than there is."""
    config, planned, out_dir = phase.config, phase.plan, phase.config.out_dir
    settings = ", ".join(f"{name} {value}" for name, value in changed(config).items() if not name.startswith(("model.", "out_dir")))
    phase.say(f"{out_dir}:\n{describe(config, planned, phase.machine, phase.world.size)}\n  settings {settings}")
    for line in described(data, planned):
        phase.say(line)
    if planned.disk_bytes > runtime.free_disk_bytes(out_dir):
        remedy = "free some space, lower --train.keep, or give another --out_dir"
        phase.say(f"warning: {out_dir}: the disk is too small for the checkpoints; {remedy}")


def _log(phase: Phase, progress: Progress) -> MetricsLog:
    """Write down the settings and this start of the run, and return its table of metrics, which ends where the run goes on.

    Raises:
        UserError, OSError: the first process cannot do it; on all of them.
    """
    config, world, out_dir = phase.config, phase.world, phase.config.out_dir
    with world.together():
        if world.is_first:
            write_whole(out_dir / "config.yaml", to_yaml(as_asked(config)).encode())
            record_start(out_dir, world, phase.machine, step=progress.step)
        return MetricsLog(
            out_dir if world.is_first else None,
            resumed_at=progress.step - (progress.due is not None),
            tensorboard=config.train.tensorboard,
            also=phase.suite.columns if phase.suite is not None else (),
        )


def _saver(config: RunConfig, say: Say) -> Saver:
    train = config.train
    return Saver(
        config.out_dir,
        keep=train.keep,
        keep_every=train.keep_every,
        background=train.async_save,
        if_fails=train.if_save_fails,
        say=say,
    )
