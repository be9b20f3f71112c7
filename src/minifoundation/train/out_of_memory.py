"""A device that is too small: which setting would help most, and the line that has it."""

from __future__ import annotations

from typing import Any

from minifoundation.config import RunConfig
from minifoundation.distributed import Split, World
from minifoundation.errors import UserError
from minifoundation.runtime import Machine
from minifoundation.train.plan import ALONE, USABLE_MEMORY, micro_batch, plan
from minifoundation.train.provenance import typed

GIB = 2**30


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether ``error`` says that memory has run out, on a GPU or on the CPU."""
    signs = ("out of memory", "DefaultCPUAllocator", "STATUS_ALLOC_FAILED")  # torch, torch on the CPU; cuBLAS and cuDNN for their own
    return any(sign in str(error) for sign in signs)


def too_large(
    config: RunConfig, machine: Machine, world: World, *, going_on: dict[str, str], split: Split = ALONE, moments: bool = False
) -> UserError:
    """Return the error of a run that does not fit: the peak, the change that helps, the memory predicted with it and the whole line.

    Args:
        going_on: the options with which the line goes on, where the run's folder holds something to go on from.
        moments: whether it goes on with the optimizer's moments of a checkpoint.
    """
    peak = f"peak {machine.peak_memory_bytes() / GIB:.1f}"
    return _does_not_fit(config, machine, world, split, peak, going_on, moments=moments)


def refuse_too_large(
    config: RunConfig, machine: Machine, world: World, split: Split = ALONE, *, moments: bool = False, planned: bool = False
) -> None:
    """Refuse a run that is predicted to take more memory than there is.

    Peaks lie within a tenth of the prediction (docs/numerics.md), mostly above it. A CPU without memory has the system kill the run, or
    others, without a word.

    Args:
        moments: whether it goes on with the optimizer's moments of a checkpoint.
        planned: it is not started: on a CPU a plan may be for another machine.

    Raises:
        UserError: with the setting that makes it fit.
    """
    needed = plan(config, world.size, split).memory_total
    if needed > machine.memory_bytes and (machine.is_cuda or not planned):
        raise _does_not_fit(config, machine, world, split, f"predicted {needed / GIB:.1f}", {}, moments=moments)


def _does_not_fit(
    config: RunConfig, machine: Machine, world: World, split: Split, peak: str, more: dict[str, Any], *, moments: bool
) -> UserError:
    train, memory = config.train, machine.memory_bytes
    options, needed = remedy(config, machine, world, split, moments=moments)
    if train.tokens_per_step is not None:
        options = {name: value for name, value in options.items() if name != "grad_accum"}  # it follows
    changes = " ".join(f"--{name} {value}" for name, value in options.items())
    if needed <= memory:
        advice = f"with {changes} {needed / GIB:.1f} GiB are predicted: {typed(world, **options, **more)}"
    else:
        smaller = "take shorter rows, a smaller model or a larger GPU, or have several read a row (train.context_parallel)"
        advice = f"even with {changes} {needed / GIB:.1f} GiB are predicted; {smaller}"
    rows, do = micro_batch(train), "does" if train.batch_size == 1 else "do"
    problem = f"{rows} of {train.seq_len} tokens {do} not fit the memory of {machine.name} ({peak} of {memory / GIB:.1f} GiB)"
    return UserError("train.batch_size" if train.batch_size != 1 else "train.seq_len", problem, advice)


def remedy(config: RunConfig, machine: Machine, world: World, split: Split = ALONE, *, moments: bool = False) -> tuple[dict[str, Any], int]:
    """Return the options that make the run fit at the least cost in speed, and the bytes predicted with them.

    Fewer rows with more micro-batches cost nearly nothing and leave the tokens of a step as they are; to recompute all but attention costs
    little in long rows, to recompute all a fifth to a third. Where nothing fits, the change with the smallest prediction comes back.
    Moments in int8 are proposed where they can be had: not in parts (``chosen_split``), nor for ``moments`` that are there.
    """
    usable = min(USABLE_MEMORY * machine.memory_bytes, 0.9 * plan(config, world.size, split).memory_total)
    tried = [
        (options, plan(_changed(config, options), world.size, split).memory_total)
        for options in _changes(config, int8=not (split.optimizer_shards > 1 or moments), offload=machine.is_cuda)
    ]
    return next(((options, needed) for options, needed in tried if needed <= usable), min(tried, key=lambda one: one[1]))


def _changes(config: RunConfig, *, int8: bool, offload: bool) -> list[dict[str, Any]]:
    train, model = config.train, config.model
    rows, micro = train.batch_size, train.grad_accum
    assert isinstance(rows, int)
    splits = [{"batch_size": rows // part, "grad_accum": micro * part} for part in range(2, rows + 1) if rows % part == 0]
    one_row = splits[-1] if splits else {}
    smaller = {"train.loss_chunk": max(min(16, train.loss_chunk), train.loss_chunk // 64 * 16)}  # fp8 needs a multiple of 16
    by_hand = offload and train.precision != "fp32" and not model.dropout  # elsewhere nothing can be offloaded
    order = ("none", "attention", *(("offload",) if by_hand else ()), "full")
    rest = order[order.index(model.checkpointing) + 1 :]
    recomputed = [{**one_row, "model.checkpointing": kind} for kind in rest]
    least: list[dict[str, Any]] = [{**one_row, "model.checkpointing": kind, **smaller} for kind in rest[-2:] or (model.checkpointing,)]
    narrow = [{**one, "train.optimizer_states": "int8"} for one in least] if int8 else []
    return [*splits, *recomputed, {**one_row, **smaller}, *least, *narrow]


def _changed(config: RunConfig, options: dict[str, Any]) -> RunConfig:
    train = {name.removeprefix("train."): value for name, value in options.items() if not name.startswith("model.")}
    model = {name.removeprefix("model."): value for name, value in options.items() if name.startswith("model.")}
    return config.replaced(train=train, model=model)
