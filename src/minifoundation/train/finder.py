"""How many rows at once: the most that are predicted to fit, shown to fit by real steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch

from minifoundation.config import RunConfig
from minifoundation.distributed import LONGER, Split, World, leave
from minifoundation.errors import UserError
from minifoundation.runtime import Machine
from minifoundation.train.out_of_memory import is_out_of_memory
from minifoundation.train.plan import ALONE, USABLE_MEMORY, micro_batch, predicted_memory
from minifoundation.train.printer import Say
from minifoundation.train.trial import trial
from minifoundation.wording import counted

MOST_ROWS = 64
"""More rows at once are no faster: the products are large by then."""

ON_A_CPU = 5
"""Times what is predicted of activations that a process on a CPU may take: eager blocks keep more than those by hand or compiled, kernels
have memory of their own, and the allocator keeps what was freed. There is no error to catch: the system kills the process."""

PATIENCE = 60.0
"""Seconds that a process which is out of memory waits for the others, at the least."""


def predicted_to_fit(config: RunConfig, machine: Machine, split: Split = ALONE) -> list[RunConfig]:
    """Return ``config`` with each number of rows at once that is predicted to fit, the most first.

    Where ``grad_accum`` was given, a step stays at that many rows: they are split into larger micro-batches, fewer of them. Else a
    micro-batch is the step, and its rows are a power of two.
    """
    rows = config.train.grad_accum
    if not rows_left_open(config):
        splits = [(most, rows // most) for most in range(min(rows, MOST_ROWS), 0, -1) if rows % most == 0]
    else:
        splits = [(2**power, 1) for power in range(MOST_ROWS.bit_length() - 1, -1, -1)]
    tried = [config.replaced(train={"batch_size": most, "grad_accum": parts}) for most, parts in splits]
    usable = USABLE_MEMORY * machine.memory_bytes
    fit = [one for one in tried if _needed(one, machine, split) <= usable]
    return fit or [one for one in tried[-1:] if sum(predicted_memory(one, split).values()) <= usable]


def _needed(config: RunConfig, machine: Machine, split: Split) -> int:
    parts = predicted_memory(config, split)
    times = 1 if machine.is_cuda else ON_A_CPU
    return sum(size * (times if name in ("activations", "loss", "block_workspace") else 1) for name, size in parts.items())


def rows_left_open(config: RunConfig) -> bool:
    """Return whether a step has as many rows as fit."""
    return config.train.batch_size == "auto" and "grad_accum" not in config.train.model_fields_set


def with_batch_size(
    config: RunConfig, machine: Machine, fits: Callable[[RunConfig], bool] = lambda _: True, split: Split = ALONE
) -> RunConfig:
    """Return ``config`` with ``batch_size: auto`` replaced by the most rows that are predicted to fit, and of which ``fits`` says so too.

    Raises:
        UserError: not even one row fits.
    """
    if config.train.batch_size != "auto":
        return config
    for one in predicted_to_fit(config, machine, split):
        if fits(one):
            return one
    narrow = "" if split.optimizer_shards > 1 else "--train.optimizer_states int8 "
    raise UserError(
        "train.batch_size",
        f"not even one row of {config.train.seq_len} tokens fits {machine.name} ({machine.memory_bytes / 2**30:.1f} GiB)",
        f"use --model.checkpointing full, {narrow}or a shorter --seq_len",
    )


def steps_fit(config: RunConfig, machine: Machine, world: World, say: Say, split: Split = ALONE) -> bool:
    """Return whether two steps fit the GPU of every process, the same on all; off CUDA nothing is tried, and the prediction counts alone.

    Where some run out of memory and others wait for them in the middle of a step, nobody can go on: the process ends with an error.
    """
    if not machine.is_cuda:
        return True
    # Two micro-batches hold what any number of them do, and are sooner done.
    short = config.replaced(train={"grad_accum": min(2, config.train.grad_accum)})
    began = time.monotonic()
    try:
        trial(short, machine, steps=1, warm_up=1, world=world, split=split)
        mine = True
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        mine = False
    with nullcontext() if mine or world.size == 1 else _answered(config, world, max(PATIENCE, LONGER * (time.monotonic() - began))):
        machine.synchronize()  # what this process has sent is received: the next trial begins with nothing on its way
        machine.forget()
        fit = all(world.of_all(mine))  # by words: the device of another may be in a collective still
    if not fit:
        torch.compiler.reset()  # it keeps a limited number of shapes, and these are of no use
        say(f"train.batch_size: {micro_batch(config.train)} predicted to fit {machine.name} did not; trying fewer")
    return fit


@contextmanager
def _answered(config: RunConfig, world: World, seconds: float) -> Iterator[None]:
    """End this process, and by that all of them, where the context is not left within ``seconds``."""
    rows, parts = config.train.batch_size, config.train.grad_accum
    assert isinstance(rows, int)
    fewer = max((number for number in range(1, rows) if rows * parts % number == 0), default=None)
    follows = "" if config.train.tokens_per_step else f" --grad_accum {rows * parts // (fewer or 1)}"
    remedy = f"give --batch_size {fewer}{follows}" if fewer else "give --model.checkpointing full or a shorter --seq_len"
    problem = f"rank {world.rank} has no memory for {counted(rows, 'row')}, and other processes, which have, do not come out of their step"
    timer = threading.Timer(seconds, leave, (f"train.batch_size: {problem}; {remedy}",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
