"""One phase of training from settings to ``final.pth``: pretrain and longft share it."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

from minifoundation import runtime
from minifoundation.checkpoint import FINAL, Checkpoint, save_final, write_whole
from minifoundation.config import RunConfig, changed, to_yaml
from minifoundation.data.supply import Supply
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.distributed import World, join, spread
from minifoundation.errors import Interrupted, UserError
from minifoundation.model.attention import Backend, resolve
from minifoundation.model.training import TrainingModel
from minifoundation.model.transformer import Transformer
from minifoundation.runtime import Machine
from minifoundation.train.corpus import TrainingData, described, training_data
from minifoundation.train.ema import Average
from minifoundation.train.finder import steps_fit, with_batch_size
from minifoundation.train.kernels import attention_kernel
from minifoundation.train.loop import fit, stop_on_signals
from minifoundation.train.metrics import MetricsLog
from minifoundation.train.optimizer import adamw
from minifoundation.train.plan import Plan, describe, plan
from minifoundation.train.resume import checkpoint_to_resume
from minifoundation.train.state import Start, Training

LESS_MEMORY = "lower --batch_size and raise --grad_accum, or take --model.checkpointing attention or full, or --train.optimizer_states int8"


def run(config: RunConfig, *, resume: str | None, dry_run: bool, start: Start | None = None) -> Path | None:
    """Train one phase and return the path of its ``final.pth`` (None for a dry run).

    Args:
        resume: ``auto`` or the path of a step checkpoint; None refuses a folder that holds a run.
        start: the checkpoint whose weights and tokenizer a later phase starts from.

    Raises:
        UserError: anything in the settings, files or device that cannot work.
        Interrupted: told to stop; saved, with the line that goes on.
    """
    with join() as world:
        machine = runtime.machine(world.local_rank)
        say = Printer(world)
        asked = _supported(config, machine, say)
        config = with_batch_size(asked, machine)
        planned = plan(config, world.size)
        if dry_run:
            if world.is_first:
                print(f"plan of {config.out_dir}:\n{describe(config, planned, machine, world.size)}\nnothing was started (--dry_run)")
            return None
        resumed = checkpoint_to_resume(config, resume, planned, say)
        if resumed is not None and resumed.progress["step"] >= planned.steps:
            say(f"{config.out_dir / FINAL} is finished: {planned.steps:,} of {planned.steps:,} steps")
            return config.out_dir / FINAL
        try:
            if asked.train.batch_size == "auto":
                config = _fitting(asked, planned, machine, world, say, resumed)
                planned = plan(config, world.size)
            return _train(config, planned, machine, world, say, resumed=resumed, start=start)
        except torch.OutOfMemoryError:
            rows = f"{config.train.batch_size} rows of {config.train.seq_len} tokens"
            raise UserError("train.batch_size", f"{rows} do not fit the memory of {machine.name}", LESS_MEMORY) from None


def _fitting(asked: RunConfig, planned: Plan, machine: Machine, world: World, say: Printer, resumed: Checkpoint | None) -> RunConfig:
    """Return ``asked`` with the batch size that real steps show to fit; a resumed run stays at the rows of its steps."""
    if resumed is not None:
        asked = asked.model_copy(update={"train": asked.train.model_copy(update={"grad_accum": planned.samples_per_step // world.size})})
    config = with_batch_size(asked, machine, lambda one: steps_fit(one, machine, world, say))
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
    dtype = runtime.compute_dtype(config.train.precision, machine)
    if config.train.precision == "fp16" and not machine.is_cuda:
        say("warning: --amp alone is fp16, which is slow on a CPU; --amp --bf16 is faster")
    _, warning = resolve(
        config.model.attention,
        machine.device.type,
        dtype=dtype,
        head_dim=config.model.head_dim,
        capability=machine.capability,
        masked=config.data.mask_documents,
    )
    if warning:
        say(f"warning: model.attention: {warning}")
    compiled = config.train.compile
    if compiled and (reason := runtime.can_compile(machine)):
        say(f"warning: --compile: {reason}; running without it")
        compiled = False
    return config.model_copy(update={"train": config.train.model_copy(update={"compile": compiled})})


def _train(
    config: RunConfig, planned: Plan, machine: Machine, world: World, say: Printer, *, resumed: Checkpoint | None, start: Start | None
) -> Path:
    out_dir = config.out_dir
    before = resumed or (start.checkpoint if start else None)
    data = training_data(config, planned, world, say, resumed=resumed, start=start)
    config = _with_vocabulary(config, data.tokenizer, before, say)
    planned = plan(config, world.size)
    settings = ", ".join(f"{name} {value}" for name, value in changed(config).items() if not name.startswith(("model.", "out_dir")))
    say(f"{out_dir}:\n{describe(config, planned, machine, world.size)}\n  settings {settings}")
    for line in described(data, planned):
        say(line)
    kernel, choice = attention_kernel(config, machine, world, resumed.kernels.get("attention") if resumed else None)
    if choice:
        say(choice)
    if machine.is_cuda and planned.memory_total > machine.memory_bytes:
        say(f"warning: train.batch_size: more memory is predicted than {machine.name} has; {LESS_MEMORY}")
    if planned.disk_bytes > runtime.free_disk_bytes(out_dir):
        say(
            f"warning: {out_dir}: the disk is too small for the checkpoints; free some space, lower --train.keep, or give another --out_dir"
        )

    background = Supply(data.to_make, config.data, data.tokenizer.path) if data.to_make and world.is_first else nullcontext()
    with background as supply:
        training = _built(config, planned, machine, world, data, supply, kernel=kernel, resumed=resumed, start=start)
        if world.is_first:
            write_whole(out_dir / "config.yaml", to_yaml(config).encode())
        with (
            stop_on_signals() as stop,
            MetricsLog(out_dir if world.is_first else None, resumed_at=data.progress.step, tensorboard=config.train.tensorboard) as log,
        ):
            finished = fit(training, log, stop)
    if not finished:
        raise Interrupted(
            f"stopped at step {data.progress.step:,} of {planned.steps:,} and saved {out_dir}; go on with the same line and --resume auto"
        )
    path = out_dir / FINAL
    if world.is_first:
        save_final(training.checkpoint(with_optimizer=False), out_dir)
        say(f"wrote {path} (metrics: {out_dir / 'metrics.csv'}, settings: {out_dir / 'config.yaml'})")
    world.wait()
    return path


def _built(
    config: RunConfig,
    planned: Plan,
    machine: Machine,
    world: World,
    data: TrainingData,
    supply: Supply | None,
    *,
    kernel: Backend,
    resumed: Checkpoint | None,
    start: Start | None,
) -> Training:
    """Return the model, optimizer and the rest in the state in which the phase begins or goes on."""
    before = resumed or (start.checkpoint if start else None)
    model_config = config.model.model_copy(update={"attention": kernel})
    with torch.device(machine.device):  # where its weights are drawn or read to: never all of them on the CPU first
        transformer = Transformer(model_config, dtype=runtime.compute_dtype(config.train.precision, machine))
    transformer.to(machine.device)  # the frequencies of RoPE are made on the CPU
    if before is None:
        transformer.initialise(config.train.seed)
    else:
        transformer.load_state_dict(before.model)
    training_model = TrainingModel(transformer, z_loss=config.train.z_loss, chunk=config.train.loss_chunk)
    if config.train.compile:
        transformer.compile_blocks()
    model = spread(training_model, world)
    optimizer = adamw(transformer, config.train)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=config.train.precision == "fp16")
    average = None
    if config.train.ema is not None:
        average = Average(dict(transformer.named_parameters()), config.train.ema, resumed.ema if resumed else None)
    earlier = start.checkpoint.ledger if start else []
    if resumed is not None:
        optimizer.load_state_dict(resumed.optimizer["adamw"])
        if resumed.optimizer["scaler"]:
            scaler.load_state_dict(resumed.optimizer["scaler"])
        earlier = resumed.ledger[: -len(data.loader.sources)]
    return Training(
        config=config,
        plan=planned,
        machine=machine,
        world=world,
        transformer=transformer,
        model=model,
        optimizer=optimizer,
        scaler=scaler,
        average=average,
        loader=data.loader,
        held_out=data.held_out,
        supply=supply,
        progress=data.progress,
        tokenizer_model=data.tokenizer.path.read_bytes(),
        earlier=earlier,
    )


def _with_vocabulary(config: RunConfig, tokenizer: Tokenizer, before: Checkpoint | None, say: Printer) -> RunConfig:
    """Return ``config`` with the model's vocabulary: the tokenizer's, padded to a multiple of 128; a checkpoint's stays."""
    size = before.config.model.vocab_size if before else -(-tokenizer.vocab_size // 128) * 128
    if size != config.model.vocab_size:
        if before is None:
            asked = f"{config.model.vocab_size:,}"
            say(f"model.vocab_size: {size:,} instead of {asked}, since the tokenizer has {tokenizer.vocab_size:,} pieces")
        config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})
    return config
