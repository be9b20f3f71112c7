"""One phase of training from settings to ``final.pth``: pretrain and longft share it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from minifoundation import runtime
from minifoundation.checkpoint import FINAL, Checkpoint, save_final, save_step, write_whole
from minifoundation.config import RunConfig, changed, to_yaml
from minifoundation.data.loader import Loader, held_out_batches
from minifoundation.data.prepare import prepare_shards, tokenizer_for
from minifoundation.data.shards import Shards
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.distributed import World, join, spread
from minifoundation.errors import Interrupted, UserError
from minifoundation.model.attention import resolve
from minifoundation.model.training import TrainingModel
from minifoundation.model.transformer import Transformer
from minifoundation.runtime import Machine
from minifoundation.train.ema import Average
from minifoundation.train.loop import HeldOut, Progress, fit, stop_on_signals
from minifoundation.train.metrics import MetricsLog
from minifoundation.train.optimizer import adamw
from minifoundation.train.plan import Plan, describe, plan, with_batch_size
from minifoundation.train.resume import checkpoint_to_resume

LESS_MEMORY = "lower --batch_size and raise --grad_accum, or take --model.checkpointing attention or full, or --train.optimizer_states int8"


@dataclass(frozen=True)
class Start:
    """What a phase begins from, when it is not random weights."""

    phase: str
    checkpoint: Checkpoint


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
        config = with_batch_size(_supported(config, machine, say), machine)
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
            return _train(config, planned, machine, world, say, resumed=resumed, start=start)
        except torch.OutOfMemoryError:
            rows = f"{config.train.batch_size} rows of {config.train.seq_len} tokens"
            raise UserError("train.batch_size", f"{rows} do not fit the memory of {machine.name}", LESS_MEMORY) from None


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
        config.model.attention, machine.device.type, dtype=dtype, head_dim=config.model.head_dim, capability=machine.capability
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
    tokenizer, shards, progress = _data(config, planned, world, say, resumed=resumed, start=start)
    config = _with_vocabulary(config, tokenizer, before, say)
    planned = plan(config, world.size)
    loader = Loader(shards, seq_len=config.train.seq_len, seed=config.train.seed, first_shard=progress.first_shard)
    _enough(config, loader, planned)
    settings = ", ".join(f"{name} {value}" for name, value in changed(config).items() if not name.startswith(("model.", "out_dir")))
    say(f"{out_dir}:\n{describe(config, planned, machine, world.size)}\n  settings {settings}")
    _say_data(config, shards, loader, planned, progress, say)
    if machine.is_cuda and planned.memory_total > machine.memory_bytes:
        say(f"warning: train.batch_size: more memory is predicted than {machine.name} has; {LESS_MEMORY}")
    if planned.disk_bytes > runtime.free_disk_bytes(out_dir):
        say(
            f"warning: {out_dir}: the disk is too small for the checkpoints; free some space, lower --train.keep, or give another --out_dir"
        )

    transformer = Transformer(config.model, dtype=runtime.compute_dtype(config.train.precision, machine))
    if before is None:
        transformer.initialise(config.train.seed)
    else:
        transformer.load_state_dict(before.model)
    transformer.to(machine.device)
    training_model = TrainingModel(transformer, z_loss=config.train.z_loss, chunk=config.train.loss_chunk)
    if config.train.compile:
        training_model.compile_blocks()
    model = spread(training_model, world)
    optimizer = adamw(transformer, config.train)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=config.train.precision == "fp16")
    average = None
    if config.train.ema is not None:
        average = Average(dict(transformer.named_parameters()), config.train.ema, resumed.ema if resumed else None)
    if resumed is not None:
        optimizer.load_state_dict(resumed.optimizer["adamw"])
        if resumed.optimizer["scaler"]:
            scaler.load_state_dict(resumed.optimizer["scaler"])
    del before, resumed, start

    assert isinstance(config.train.batch_size, int)
    batches = held_out_batches(shards, seq_len=config.train.seq_len, batch_size=config.train.batch_size, tokens=config.train.eval_tokens)
    held_out = HeldOut(batches, shards.bytes_per_token) if batches else None
    tokenizer_model = tokenizer.path.read_bytes()

    def checkpoint(*, with_optimizer: bool) -> Checkpoint:
        return Checkpoint(
            config=config,
            model=transformer.state_dict(),
            tokenizer_model=tokenizer_model,
            progress=progress.as_dict(),
            ema=average.state() if average else None,
            optimizer={"adamw": optimizer.state_dict(), "scaler": scaler.state_dict()} if with_optimizer else {},
        )

    def save() -> None:
        if world.is_first:
            save_step(checkpoint(with_optimizer=True), out_dir, keep=config.train.keep)

    if world.is_first:
        write_whole(out_dir / "config.yaml", to_yaml(config).encode())
    with (
        stop_on_signals() as stop,
        MetricsLog(out_dir if world.is_first else None, resumed_at=progress.step, tensorboard=config.train.tensorboard) as log,
    ):
        finished = fit(
            model,
            optimizer,
            scaler,
            average,
            loader,
            held_out,
            config=config.train,
            plan=planned,
            progress=progress,
            machine=machine,
            world=world,
            log=log,
            save=save,
            stop=stop,
        )
    if not finished:
        raise Interrupted(
            f"stopped at step {progress.step:,} of {planned.steps:,} and saved {out_dir}; go on with the same line and --resume auto"
        )
    path = out_dir / FINAL
    if world.is_first:
        save_final(checkpoint(with_optimizer=False), out_dir)
        say(f"wrote {path} (metrics: {out_dir / 'metrics.csv'}, settings: {out_dir / 'config.yaml'})")
    world.wait()
    return path


def _data(
    config: RunConfig, planned: Plan, world: World, say: Printer, *, resumed: Checkpoint | None, start: Start | None
) -> tuple[Tokenizer, Shards, Progress]:
    """Return the tokenizer, the shards that hold enough tokens, and the progress at which the phase begins or goes on.

    The first process prepares; the others wait, then open what it made.
    """
    folder = config.out_dir / "tokenizer"
    before = resumed or (start.checkpoint if start else None)

    def prepared() -> tuple[Tokenizer, Shards, Progress]:
        if before is not None:
            _keep_tokenizer(before, folder, config)
        tokenizer = tokenizer_for(config.tokenizer, config.data, folder)
        slack = 1 + config.train.seq_len / config.data.shard_tokens  # a shard's last tokens may be too few for a sample
        wanted = int(planned.tokens * slack) + config.train.seq_len
        shards = prepare_shards(config.data, tokenizer, tokens=wanted, threads=config.data.workers)
        if resumed is not None:
            progress = Progress(**resumed.progress)
        else:
            progress = Progress(phase=start.phase if start else "pretrain", first_shard=_first_unread(config, shards, start, say))
        if progress.first_shard:
            read = sum(shard.n_tokens for shard in shards.train[: progress.first_shard])
            shards = prepare_shards(config.data, tokenizer, tokens=read + wanted, threads=config.data.workers)
        return tokenizer, shards, progress

    if world.is_first:
        made = prepared()
        world.wait()
        return made
    world.wait()
    return prepared()


def _keep_tokenizer(checkpoint: Checkpoint, folder: Path, config: RunConfig) -> None:
    """Put the tokenizer of the checkpoint in place, so that a later phase can use no other."""
    model = folder / "tokenizer.model"
    given = config.tokenizer.path
    if given is not None and given.exists() and given.read_bytes() != checkpoint.tokenizer_model:
        raise UserError(
            "tokenizer.path",
            f"{given} is not the tokenizer the weights were trained with",
            "leave it out: the checkpoint holds the right one",
        )
    if not model.exists() or model.read_bytes() != checkpoint.tokenizer_model:
        write_whole(model, checkpoint.tokenizer_model)


def _first_unread(config: RunConfig, shards: Shards, start: Start | None, say: Printer) -> int:
    """Return the first shard that the phase before did not read; 0 when it read another corpus, or all of this one."""
    if start is None:
        return 0
    old, progress = start.checkpoint.config, Progress(**start.checkpoint.progress)
    if (old.data.source, old.data.text_column) != (config.data.source, config.data.text_column):
        say(f"data: another corpus than the phase before ({old.data.source}); reading it from the start")
        return 0
    reader = Loader(shards, seq_len=old.train.seq_len, seed=old.train.seed, first_shard=progress.first_shard)
    unread = reader.shard_of(progress.sample - 1) + 1 if 0 < progress.sample <= reader.samples_per_epoch else 0
    if unread == 0 or (unread == len(shards.train) and shards.complete):
        say("data: the phase before has come to the end of the corpus; reading it again from the start")
        return 0
    say(f"data: starting at shard {unread}, after the {progress.tokens:,} tokens that the phase before has seen")
    return unread


def _with_vocabulary(config: RunConfig, tokenizer: Tokenizer, before: Checkpoint | None, say: Printer) -> RunConfig:
    """Return ``config`` with the model's vocabulary: the tokenizer's, padded to a multiple of 128; a checkpoint's stays."""
    size = before.config.model.vocab_size if before else -(-tokenizer.vocab_size // 128) * 128
    if size != config.model.vocab_size:
        if before is None:
            asked = f"{config.model.vocab_size:,}"
            say(f"model.vocab_size: {size:,} instead of {asked}, since the tokenizer has {tokenizer.vocab_size:,} pieces")
        config = config.model_copy(update={"model": config.model.model_copy(update={"vocab_size": size})})
    return config


def _enough(config: RunConfig, loader: Loader, planned: Plan) -> None:
    if loader.samples_per_epoch < planned.samples_per_step:
        raise UserError(
            config.data.source,
            f"holds {loader.samples_per_epoch:,} samples of {config.train.seq_len} tokens, and one step takes {planned.samples_per_step:,}",
            "give more text, or lower --batch_size, --grad_accum or --seq_len",
        )


def _say_data(config: RunConfig, shards: Shards, loader: Loader, planned: Plan, progress: Progress, say: Printer) -> None:
    epochs = planned.steps * planned.samples_per_step / loader.samples_per_epoch
    repeated = f", read {epochs:.1f} times" if epochs > 1 and shards.complete else ""
    say(f"  data     {shards.train_tokens:,} tokens in {len(shards.train)} shards{repeated}; held out {shards.held_out_tokens:,} tokens")
    if shards.manifest.skipped:
        say("  skipped  " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(shards.manifest.skipped.items())))
    if shards.held_out_tokens <= config.train.seq_len:
        say("warning: data.held_out: too few documents fell into it to evaluate on; raise data.held_out or lower data.max_document_bytes")
