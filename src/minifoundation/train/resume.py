"""Which checkpoint a run goes on from, and whether it is still the same run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from minifoundation.checkpoint import FINAL, Checkpoint, latest_good, load_checkpoint, step_folders
from minifoundation.config import RunConfig, dotted_names
from minifoundation.errors import UserError
from minifoundation.train.plan import Plan

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
    "train.compile",
    "train.loss_chunk",
    "train.log_every",
    "train.eval_every",
    "train.eval_tokens",
    "train.save_every",
    "train.keep",
    "train.tensorboard",
)
"""Settings (or sections, with a dot at the end) that a resumed run may change: the data and the arithmetic stay what they were."""


def checkpoint_to_resume(config: RunConfig, resume: str | None, planned: Plan, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the checkpoint to go on from, or None to begin.

    Raises:
        UserError: the folder holds a run and nothing was said about it, or the checkpoint is of another run.
    """
    out_dir = config.out_dir
    if resume is None:
        steps = step_folders(out_dir)
        done = (out_dir / FINAL).exists()
        if done or steps or (out_dir / "metrics.csv").exists():
            state = "a finished run" if done else f"a run at {steps[-1].name}" if steps else "a run without a checkpoint yet"
            raise UserError(str(out_dir), f"holds {state}", "type --resume auto to go on with it, or --out_dir for another folder")
        return None
    if resume == "auto":
        final = out_dir / FINAL
        folder = final if final.exists() else latest_good(out_dir)
        if folder is None:
            say(f"{out_dir}: no checkpoint yet, beginning at step 0")
            return None
    else:
        folder = Path(resume)
    checkpoint = load_checkpoint(folder)
    _same_run(checkpoint, config, planned, folder)
    if not checkpoint.optimizer and checkpoint.progress["step"] < planned.steps:
        raise UserError(str(folder), "holds no optimizer state to go on with", "give a step_ folder, or start a new phase with longft")
    say(f"going on from {folder} at step {checkpoint.progress['step']:,} of {planned.steps:,}")
    return checkpoint


def _same_run(checkpoint: Checkpoint, config: RunConfig, planned: Plan, folder: Path) -> None:
    """Refuse to go on with settings under which the rest of the run would not be the run that was begun."""
    for name in dotted_names(RunConfig):
        if name.startswith(MAY_CHANGE):
            continue
        before, now = _value(checkpoint.config, name), _value(config, name)
        if before != now:
            raise UserError(name, f"{now} here, but {before} in {folder}", f"set it to {before}, or start another run with --out_dir")
    if checkpoint.progress["step"]:
        rows = checkpoint.progress["sample"] // checkpoint.progress["step"]
        if planned.samples_per_step != rows:
            raise UserError(
                "train.batch_size x train.grad_accum x processes",
                f"{planned.samples_per_step} rows a step here, but {rows} in {folder}",
                f"choose them so that their product is {rows}",
            )


def _value(config: RunConfig, name: str) -> object:
    value: object = config
    for part in name.split("."):
        value = getattr(value, part)
    return value
