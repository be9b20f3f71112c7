"""One phase of training from settings to ``final.pth``: pretrain and longft share it."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from minifoundation import runtime
from minifoundation.checkpoint import FINAL, Checkpoint, Saver, load_checkpoint, save_final, step_folders, tidy, write_whole
from minifoundation.config import RunConfig, changed, to_yaml
from minifoundation.data.supply import Supply
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.distributed import Split, Watch, World, join, sharing_rows
from minifoundation.errors import Stopped
from minifoundation.lock import LOCK, held
from minifoundation.model.attention import resolve
from minifoundation.model.training import TrainingModel
from minifoundation.runtime import Machine
from minifoundation.train.corpus import TrainingData, described, refuse_absent, run_tokenizer, training_data
from minifoundation.train.ema import Average
from minifoundation.train.finder import rows_left_open, steps_fit, with_batch_size, with_rows
from minifoundation.train.guard import Guard
from minifoundation.train.kernels import Kernels, chosen_kernels, transformer_for
from minifoundation.train.loop import fit
from minifoundation.train.meeting import network, same_data, same_run, same_weights
from minifoundation.train.metrics import METRICS, MetricsLog
from minifoundation.train.optimizer import adamw, restore_optimizer
from minifoundation.train.out_of_memory import is_out_of_memory, refuse_too_large, too_large
from minifoundation.train.parallel import accumulated, as_asked, chosen_split, spread_over
from minifoundation.train.plan import Plan, describe, plan
from minifoundation.train.provenance import record_start, typed
from minifoundation.train.resume import checkpoint_to_resume, refuse_another_run, set_later_aside
from minifoundation.train.rollback import Bad, checkpoint_before, record_rollback, stepped_over
from minifoundation.train.state import Start, Training
from minifoundation.train.stop import Stop, stop_on_signals
from minifoundation.train.suite import Suite


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
    """
    with join() as world, stop_on_signals(config.train.max_hours) as stop:
        machine = runtime.machine(world.local_rank)
        # What fits the smallest of the devices fits all of them, and no process finds other rows than the others.
        machine = replace(machine, memory_bytes=min(world.of_all(machine.memory_bytes)))
        say = Printer(world)
        same_run(config, world)
        with world.together():
            world = sharing_rows(world, config.train.context_parallel)
            asked = accumulated(_supported(config, machine, say), world)
            split = world.agreed(lambda: chosen_split(asked, machine, world))
            config = world.agreed(lambda: with_batch_size(asked, machine, split=split))
            planned = plan(config, world.size, split)
        if dry_run and world.is_first:
            if start is None and resume is None and (given := config.tokenizer.path) is not None and given.exists():
                config = _with_vocabulary(config, _padded(Tokenizer.load(given), config, say))
                planned = plan(config, world.size, split)
            print(f"plan of {config.out_dir}:\n{describe(config, planned, machine, world.size)}\nnothing was started (--dry_run)")
        moments = _has_moments(config, resume, start)
        world.agreed(lambda: refuse_too_large(config, machine, world, split, moments=moments, planned=dry_run))
        if dry_run:
            if planned.memory_total > machine.memory_bytes:
                say(f"warning: {machine.name} has less memory than that: a run is refused here")
            if start is None:
                world.agreed(lambda: refuse_absent(config))
            return None
        try:
            with world.together():
                path, resumed = checkpoint_to_resume(config.out_dir, resume, world, say)
            if resumed is not None and path is not None:
                asked = _with_rows_of(resumed, asked, world)
                config = world.agreed(lambda: with_batch_size(asked, machine, split=split))
                with world.together():
                    planned = plan(config, world.size, split)
                    refuse_another_run(resumed, config, allowed, planned, path, say)
            final = config.out_dir / FINAL
            if resumed is not None and resumed.progress["step"] >= planned.steps and not resumed.optimizer:
                say(f"{final} is finished: {planned.steps:,} of {planned.steps:,} steps")
                return final
            with ExitStack() as owned:
                world.agreed(lambda: owned.enter_context(_owned(config.out_dir)))
                step = resumed.progress["step"] if resumed else 0
                world.agreed(lambda: set_later_aside(config.out_dir, step, say))
                with world.together():
                    suite = suite_for(config)
                before = resumed or (start.checkpoint if start else None)
                vocabulary = world.agreed(lambda: _vocabulary(config, before, say))
                config = _with_vocabulary(config, vocabulary)
                with world.together():
                    if asked.train.batch_size == "auto":  # only now is it known which model has to fit
                        config = _fitting(_with_vocabulary(asked, vocabulary), split, machine, world, say)
                    planned = plan(config, world.size, split)
                return _trained(config, planned, machine, world, say, stop, path=path, resumed=resumed, start=start, suite=suite)
        except KeyboardInterrupt:
            if stop.nothing_to_save:
                there = "nothing is lost" if step_folders(config.out_dir) else "no step was done yet"
                raise Stopped(f"stopped ({there}); go on with: {typed(world, **_going_on(config, resume))}") from None
            raise
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            begun = bool(step_folders(config.out_dir)) or (config.out_dir / METRICS).exists()
            going_on = _going_on(config, resume) if begun else {}
            fault = too_large(config, machine, world, split=split, going_on=going_on, moments=_has_moments(config, resume, start))
        raise fault  # outside the handler, so that what the device held for the step is free


def _going_on(config: RunConfig, resume: str | None) -> dict[str, str]:
    """Return the option with which the same line goes on: the path that was typed stays until the run has saved something itself."""
    typed_path = resume not in (None, "auto") and not step_folders(config.out_dir)
    return {} if typed_path else {"resume": "auto"}


def _has_moments(config: RunConfig, resume: str | None, start: Start | None) -> bool:
    """Return whether the run, or the line that goes on with it, has its optimizer's moments from a checkpoint."""
    carried = start is not None and start.with_optimizer
    return carried or resume not in (None, "auto") or bool(step_folders(config.out_dir))


@contextmanager
def _owned(out_dir: Path) -> Iterator[None]:
    """Hold the folder of the run, and remove what a killed one has left half-written in it."""
    ours = not out_dir.exists()
    out_dir.mkdir(parents=True, exist_ok=True)
    with held(out_dir):
        tidy(out_dir)
        try:
            yield
        finally:
            if ours and out_dir.is_dir() and [path.name for path in out_dir.iterdir()] == [LOCK]:  # a mistake leaves no folder behind
                shutil.rmtree(out_dir)


def _trained(
    config: RunConfig,
    planned: Plan,
    machine: Machine,
    world: World,
    say: Printer,
    stop: Stop,
    *,
    path: Path | None,
    resumed: Checkpoint | None,
    start: Start | None,
    suite: Suite | None,
) -> Path:
    """Train to the end and return ``final.pth``, going back to a checkpoint as often as that is needed and allowed.

    Args:
        path: where ``resumed`` lies, perhaps in another folder than the run's own.
    """
    again = False
    while True:
        outcome = _train(config, planned, machine, world, say, stop, resumed=resumed, start=start, suite=suite, again=again)
        if isinstance(outcome, Path):
            return outcome
        folder = world.agreed(partial(_gone_back, outcome, config, path, say))
        resumed = load_checkpoint(folder, verified=True) if folder else None
        torch.compiler.reset()
        machine.forget()  # a model that is split lies in a cycle, and there is no room for two
        again = True


def _gone_back(bad: Bad, config: RunConfig, path: Path | None, say: Printer) -> Path | None:
    """Return the checkpoint from which the run goes on, once the folder says so; None for the beginning.

    Where the run has none of its own from before that it is the one it went on from (``path``).
    """
    folder = checkpoint_before(bad, config.out_dir, most=config.train.max_rollbacks, say=say)
    elsewhere = path if folder is None and path is not None and path.parent.resolve() != config.out_dir.resolve() else None
    say(f"going back to {folder or elsewhere or 'the beginning'}, and over what was skipped: {bad}")
    record_rollback(bad, folder, config.out_dir)
    return folder or elsewhere


def _with_rows_of(resumed: Checkpoint, asked: RunConfig, world: World) -> RunConfig:
    """Return ``asked`` with the rows a step that the run has; with ``batch_size: auto`` only how many fit at once is found anew."""
    return with_rows(asked, max(1, resumed.progress["samples_per_step"] // world.dp_size)) if rows_left_open(asked) else asked


def _vocabulary(config: RunConfig, before: Checkpoint | None, say: Printer) -> int:
    """Return the size of the model's vocabulary: its tokenizer's, padded; a checkpoint's stays."""
    there = config.out_dir / "tokenizer" / "tokenizer.model"
    if before is None and config.tokenizer.path is None and there.exists():  # of a run that was broken off, perhaps on another corpus
        say(f"tokenizer: {there} is there already, and is used")
    tokenizer = run_tokenizer(config, before)
    return _padded(tokenizer, config, say) if before is None else before.config.model.vocab_size


def _padded(tokenizer: Tokenizer, config: RunConfig, say: Printer) -> int:
    """Return the pieces of ``tokenizer`` padded to a multiple of 128, and say where ``config`` has others."""
    size = -(-tokenizer.vocab_size // 128) * 128
    if size != config.model.vocab_size:
        asked = f"{config.model.vocab_size:,}"
        say(f"model.vocab_size: {size:,} instead of {asked}, since the tokenizer has {tokenizer.vocab_size:,} pieces")
    return size


def _with_vocabulary(config: RunConfig, size: int) -> RunConfig:
    """Return ``config`` with a model of ``size`` pieces."""
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})


def _fitting(asked: RunConfig, split: Split, machine: Machine, world: World, say: Printer) -> RunConfig:
    """Return ``asked`` with the batch size that real steps show to fit."""
    config = with_batch_size(asked, machine, lambda one: steps_fit(one, machine, world, say, split), split)
    say(f"train.batch_size: auto is {config.train.batch_size} rows x {config.train.grad_accum} micro-batches")
    return config


class Printer:
    """Prints on the first process only, above the progress bar."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __call__(self, line: str) -> None:
        if self.world.is_first:
            tqdm.write(line, file=sys.stderr)


def _supported(config: RunConfig, machine: Machine, say: Printer) -> RunConfig:
    """Return ``config`` with what this machine cannot do replaced by the fallback, each said in one line."""
    if config.train.precision == "fp8" and (obstacle := runtime.fp8_obstacle(machine)):
        say(f"warning: train.precision: fp8 cannot run here: {obstacle}; using bf16")
        config = config.model_copy(update={"train": config.train.model_copy(update={"precision": "bf16"})})
    dtype = runtime.compute_dtype(config.train.precision, machine)
    if config.train.precision == "fp16" and not machine.is_cuda:
        say("warning: --amp alone is fp16, which is slow on a CPU; --amp --bf16 is faster")
    _, warning = resolve(
        config.model.attention,
        machine.device.type,
        dtype=dtype,
        head_dim=config.model.head_width,
        capability=machine.capability,
        masked=config.data.mask_documents,
        chunked=config.train.context_parallel > 1,
    )
    if warning:
        say(f"warning: model.attention: {warning}")
    if config.model.checkpointing == "offload" and (obstacle := _offload_obstacle(config, machine)):
        say(f"warning: model.checkpointing: offload {obstacle}; using attention")
        config = config.model_copy(update={"model": config.model.model_copy(update={"checkpointing": "attention"})})
    if config.train.deterministic:
        runtime.make_deterministic()
        if machine.is_cuda and config.model.attention == "auto":  # of the fast kernels, the one whose backward follows torch's switch
            config = config.model_copy(update={"model": config.model.model_copy(update={"attention": "flash"})})
    compiled = config.train.compile
    if compiled and (reason := runtime.can_compile(machine)):
        say(f"warning: --compile: {reason}; running without it")
        compiled = False
    return config.model_copy(update={"train": config.train.model_copy(update={"compile": compiled})})


def _offload_obstacle(config: RunConfig, machine: Machine) -> str | None:
    """Return why activations cannot be kept in host memory, or None: it is the blocks by hand that do it."""
    if not machine.is_cuda:
        return f"needs a CUDA GPU and this is {machine.device.type}"
    if config.train.precision == "fp32":
        return "is for half precision"
    return "cannot do dropout" if config.model.dropout else None


def _train(
    config: RunConfig,
    planned: Plan,
    machine: Machine,
    world: World,
    say: Printer,
    stop: Stop,
    *,
    resumed: Checkpoint | None,
    start: Start | None,
    suite: Suite | None,
    again: bool,
) -> Path | Bad:
    """Train from ``resumed`` or the beginning, and return ``final.pth``, or the steps from which nothing could be learnt.

    Args:
        again: the plan has been told before.

    Raises:
        Stopped: told to stop; saved.
    """
    out_dir = config.out_dir
    data = training_data(config, planned, world, say, resumed=resumed, start=start, stepped_over=stepped_over(out_dir))
    same_data(data.loader, data.progress.sample, world)
    if not again:
        _tell(config, planned, machine, world, data, say)
        for line in network(machine, world):
            say(line)
    kernels, choices = chosen_kernels(config, machine, world, resumed.kernels if resumed else {})
    for choice in [] if again else choices:
        say(choice)
    background = Supply(data.to_make, config.data, data.tokenizer.path) if data.to_make and world.is_first else nullcontext()
    with background as supply, _saver(config, say) as saver:
        training = _built(
            config, planned, machine, world, data, supply, saver, say, kernels=kernels, resumed=resumed, start=start, suite=suite
        )
        progress = data.progress
        if world.is_first:
            write_whole(out_dir / "config.yaml", to_yaml(as_asked(config)).encode())
            record_start(out_dir, world, machine, step=progress.step)
        resumed_at = progress.step - (progress.due is not None)
        folder = out_dir if world.is_first else None
        scores = suite.columns if suite is not None else ()
        with MetricsLog(folder, resumed_at=resumed_at, tensorboard=config.train.tensorboard, also=scores) as log:
            outcome = fit(training, log, stop)
        if isinstance(outcome, Bad):
            return outcome
        if outcome == "stopped":
            raise Stopped(
                f"{stop.reason}: stopped at step {progress.step:,} of {planned.steps:,} and saved {out_dir}; "
                f"go on with: {typed(world, resume='auto')}"
            )
        saver.finish()
        path = out_dir / FINAL
        checkpoint = training.checkpoint(with_optimizer=False)
        if planned.split.is_sharded:
            checkpoint = checkpoint.in_host_memory(kept=world.is_first)
        world.agreed(lambda: save_final(checkpoint, out_dir))
        say(f"wrote {path} (metrics: {out_dir / METRICS}, settings: {out_dir / 'config.yaml'})")
        return path


def _tell(config: RunConfig, planned: Plan, machine: Machine, world: World, data: TrainingData, say: Printer) -> None:
    """Print the plan, and warn of what it needs more than there is."""
    out_dir = config.out_dir
    settings = ", ".join(f"{name} {value}" for name, value in changed(config).items() if not name.startswith(("model.", "out_dir")))
    say(f"{out_dir}:\n{describe(config, planned, machine, world.size)}\n  settings {settings}")
    for line in described(data, planned):
        say(line)
    if planned.disk_bytes > runtime.free_disk_bytes(out_dir):
        say(
            f"warning: {out_dir}: the disk is too small for the checkpoints; free some space, lower --train.keep, or give another --out_dir"
        )


@contextmanager
def _saver(config: RunConfig, say: Printer) -> Iterator[Saver]:
    train = config.train
    saver = Saver(
        config.out_dir,
        keep=train.keep,
        keep_every=train.keep_every,
        background=train.async_save,
        if_fails=train.if_save_fails,
        say=say,
    )
    try:
        yield saver
    except KeyboardInterrupt:
        raise  # a second signal leaves at once, whatever is being written
    except BaseException:
        saver.close()
        raise
    saver.close()


def _built(
    config: RunConfig,
    planned: Plan,
    machine: Machine,
    world: World,
    data: TrainingData,
    supply: Supply | None,
    saver: Saver,
    say: Printer,
    *,
    kernels: Kernels,
    resumed: Checkpoint | None,
    start: Start | None,
    suite: Suite | None,
) -> Training:
    """Return the model, optimizer and the rest in the state in which the phase begins or goes on."""
    before = resumed or (start.checkpoint if start else None)
    transformer = transformer_for(config, machine, kernels, planned.split, world.context)
    if before is None:
        transformer.initialise(config.train.seed)
    else:
        transformer.load_state_dict(before.model)
    same_weights(transformer, world)
    training_model = TrainingModel(transformer, z_loss=config.train.z_loss, chunk=config.train.loss_chunk)
    if config.train.compile:
        transformer.compile_blocks()
    model = spread_over(training_model, config, machine, world, planned.split)
    optimizer = adamw(transformer, config.train)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=config.train.precision == "fp16")
    average = None
    if config.train.ema is not None:
        average = Average(dict(transformer.named_parameters()), config.train.ema, resumed.ema if resumed else None)
    guard = Guard(config.train.spike_z, config.train.spike_window, machine.device, resumed.window if resumed else None)
    earlier = start.checkpoint.ledger if start else []
    if start is not None and start.with_optimizer and resumed is None:
        restore_optimizer(optimizer, {weight: name for name, weight in transformer.named_parameters()}, start.checkpoint.optimizer)
    if resumed is not None:
        restore_optimizer(optimizer, {weight: name for name, weight in transformer.named_parameters()}, resumed.optimizer)
        if transformer.scales is not None:
            transformer.scales.load({name: value.to(machine.device) for name, value in resumed.kernel_state.items()})
        if resumed.scaler:
            scaler.load_state_dict(resumed.scaler)
        earlier = resumed.ledger[: -len(data.loader.sources)]
    return Training(
        config=config,
        plan=planned,
        machine=machine,
        world=world,
        kernels=kernels,
        transformer=transformer,
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        average=average,
        loader=data.loader,
        held_out=data.held_out,
        supply=supply,
        progress=data.progress,
        tokenizer_model=data.tokenizer.model,
        earlier=earlier,
        guard=guard,
        watch=Watch(world, config.train.rank_timeout, config.out_dir),
        suite=suite,
        saver=saver,
        say=say,
    )
