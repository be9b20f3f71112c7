"""Which checkpoint a run goes on from, and whether it is still the same run."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path

from minifoundation.checkpoint import (
    FINAL,
    FINAL_MANIFEST,
    Checkpoint,
    fault,
    latest_good,
    load_checkpoint,
    set_aside,
    step_folders,
    step_of,
)
from minifoundation.config import RunConfig, dotted_names
from minifoundation.distributed import World
from minifoundation.errors import UserError
from minifoundation.train.metrics import METRICS
from minifoundation.train.plan import Plan
from minifoundation.train.printer import Say
from minifoundation.train.rollback import ROLLBACKS
from minifoundation.wording import counted

MAY_CHANGE = (
    "out_dir",
    "data.shards_dir",
    "data.workers",
    "model.attention",
    "model.checkpointing",
    "model.checkpoint_every",
    "model.vocab_size",  # follows from the tokenizer
    "tokenizer.",  # compared by its own file
    "train.batch_size",  # the rows of a step are compared, not how they are split
    "train.grad_accum",
    "train.tokens_per_step",
    "train.parallel",
    "train.context_parallel",
    "train.rank_timeout",
    "train.compile",
    "train.loss_chunk",
    "train.log_every",
    "train.eval_every",
    "train.eval_tokens",
    "train.save_every",
    "train.keep",
    "train.keep_every",
    "train.async_save",
    "train.if_save_fails",
    "train.max_hours",
    "train.max_rollbacks",
    "train.tensorboard",
    "eval.",
)
"""Settings (or sections, with a dot at the end) that a resumed run may change: the data and the arithmetic stay what they were."""

FOLLOWS = ("model.vocab_size", "tokenizer.path", "out_dir")
"""Of those that may change, what is not worth a word."""

FIXED = (
    *("data.source", "data.mix", "data.min_tokens", "data.long_share", "data.long_repeats", "data.search_tokens", "train.seq_len"),
    "train.seed",  # of it the order within a shard is drawn
    *("model.d_model", "model.n_layer", "model.n_head", "model.n_kv_head", "model.head_dim", "model.d_ff"),
    *("model.qk_norm", "model.tie_embeddings", "train.optimizer_states"),
)
"""Settings that cannot change within a run, not even on purpose: the place in the data is a number that they give its meaning, or a
checkpoint's tensors have their shapes. With ``data.min_tokens`` the first holds of ``train.tokens`` too, by which shares are chosen."""


def checkpoint_to_resume(out_dir: Path, resume: str | None, world: World, say: Say) -> tuple[Path | None, Checkpoint | None]:
    """Return the checkpoint to go on from and where it lies, or None to begin.

    Args:
        resume: ``auto``, the path of a checkpoint, or None.

    Raises:
        UserError: there is no such checkpoint, or none of those that the folder holds is whole.
    """
    if resume is None:
        return None, None
    path = world.agreed(lambda: newest(out_dir, say)) if resume == "auto" else Path(resume)
    if path is None:
        say(f"{out_dir}: no checkpoint yet, beginning at step 0")
        return None, None
    return path, load_checkpoint(path, verified=resume == "auto")


def refuse_used(out_dir: Path) -> None:
    """Refuse to begin in a folder that holds a run.

    Raises:
        UserError: it does.
    """
    steps = step_folders(out_dir)
    done = (out_dir / FINAL).exists()
    if done or steps or (out_dir / "metrics.csv").exists():
        state = "a finished run" if done else f"a run at {steps[-1].name}" if steps else "a run without a checkpoint yet"
        raise UserError(str(out_dir), f"holds {state}", "add --resume auto to continue it, or --out_dir for another folder")


def newest(out_dir: Path, say: Say) -> Path | None:
    """Return the newest checkpoint of a run that is whole, ``final.pth`` before all; None where there is none yet.

    Raises:
        UserError: there are some, and none is whole.
    """
    final = out_dir / FINAL
    if final.exists():
        problem = fault(final)
        if problem is None:
            return final
        say(f"warning: {final}: {problem}; passed over")
    folder = latest_good(out_dir, say)
    if folder is None and (final.exists() or step_folders(out_dir)):
        raise UserError(str(out_dir), "holds checkpoints, but none of them is intact", "begin again in another --out_dir")
    return folder


def set_others_aside(out_dir: Path, path: Path, step: int, say: Say) -> None:
    """Set aside what is not of the run that goes on from ``path``, which is of ``step``.

    The next ``--resume auto``, or going back, would take it for that: later checkpoints, damaged or of another course that the run took, a
    ``final.pth`` among them; all, where ``path`` lies in another folder.
    """
    elsewhere = path.parent.resolve() != out_dir.resolve()
    for folder in step_folders(out_dir):
        if step_of(folder) > step:
            say(f"{folder}: is after the step to continue from; kept as {set_aside(folder).name}")
        elif elsewhere or (step_of(folder) == step and folder.resolve() != path.resolve()):
            say(f"{folder}: is of another run than {path}; kept as {set_aside(folder).name}")
    final, manifest = out_dir / FINAL, out_dir / FINAL_MANIFEST
    if final.exists():
        say(f"{final}: is after the step to continue from; kept as {set_aside(final).name}")
    if manifest.exists():
        set_aside(manifest)
    for log in (out_dir / METRICS, out_dir / ROLLBACKS):  # of the run that goes on, its checkpoint knows what it has left out
        if elsewhere and log.exists():
            say(f"{log}: is of another run than {path}; kept as {set_aside(log).name}")


def _may_change(name: str) -> bool:
    section, dot, _ = name.partition(".")
    return name in MAY_CHANGE or section + dot in MAY_CHANGE


def refuse_another_run(checkpoint: Checkpoint, config: RunConfig, allowed: tuple[str, ...], planned: Plan, path: Path, say: Say) -> None:
    """Refuse to go on with settings under which the rest of the run would not be the run that was begun; tell of others that differ.

    Args:
        allowed: settings that may differ from the checkpoint's although they change the result.

    Raises:
        UserError: one differs that may not, or the checkpoint cannot be gone on from.
    """
    told = []
    follows = (*FOLLOWS, *(["train.grad_accum"] if checkpoint.config.train.tokens_per_step or config.train.tokens_per_step else ()))
    for name in dotted_names(RunConfig):
        before, now = map(attrgetter(name), (checkpoint.config, config))
        if before == now:
            continue
        fixed = name in FIXED or (name == "train.tokens" and config.data.min_tokens is not None)
        if _may_change(name) or (name in allowed and not fixed):
            if name not in follows:
                told.append(f"{name} {now} instead of {before}")
            continue
        remedy = f"set it to {before}, or start another run with --out_dir"
        if not fixed:
            remedy = f"set it to {before}, start another run with --out_dir, or change it on purpose with --allow_change {name}"
        raise UserError(name, f"{now} here, but {before} in {path}", remedy)
    done, rows = checkpoint.progress["step"], checkpoint.progress["samples_per_step"]
    if planned.samples_per_step != rows:
        raise UserError(
            "train.batch_size x train.grad_accum x processes",
            f"{counted(planned.samples_per_step, 'row')} a step here, but {rows} in {path}",
            f"choose them so that their product is {rows}",
        )
    if done > planned.steps:
        problem = f"{config.train.tokens:,} are {counted(planned.steps, 'step')}, and {path} has done {done:,}"
        raise UserError("train.tokens", problem, f"give at least {done * planned.tokens_per_step:,}, or an earlier checkpoint")
    if not checkpoint.optimizer and 0 < done < planned.steps:
        raise UserError(
            str(path), "holds no optimizer state to continue with", "give a step_ folder, or begin a new phase with --init_from"
        )
    if told:
        say(f"changed since {path}: {', '.join(told)}")
    say(f"continuing from {path} at step {done:,} of {planned.steps:,}")
