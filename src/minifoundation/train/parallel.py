"""How a run is spread over its processes, and what of a step each of them does."""

from __future__ import annotations

import torch
from torch import nn

from minifoundation import runtime
from minifoundation.config import RunConfig
from minifoundation.data.batch import Batch
from minifoundation.distributed import Split, World, spread
from minifoundation.errors import UserError
from minifoundation.model.size import rows_divisor
from minifoundation.model.training import TrainingModel
from minifoundation.runtime import Machine
from minifoundation.train.meeting import bus_bandwidth
from minifoundation.train.plan import USABLE_MEMORY, predicted_memory, sharers

FAST = 100e9
"""Bytes/s of sums over a machine's GPUs above which gradients travel after the backward: NVLink does 230e9 and more, PCIe 40e9.

Beside it they cost more than that, in products that wait for processors (docs/scaling.md); only what takes long is worth hiding.
"""


def chosen_split(config: RunConfig, machine: Machine, world: World) -> Split:
    """Return how the model lies on the processes: as asked, or the copies that are fastest where they fit, or as few parts as do.

    Gathered weights are kept from the forward of a block to its backward where that fits, so that they travel once.

    Raises:
        UserError: this cannot be had with so many processes or in this precision.
    """
    asked, size, train = config.train.parallel, world.size, config.train
    if size == 1:
        return Split()
    if asked == "none":
        raise UserError("train.parallel", f"none, and there are {size} processes", "start one, or take auto, ddp or fsdp")
    if asked in ("fsdp", "hsdp") and train.precision == "fp8":
        raise UserError("train.parallel", f"{asked} gathers weights in half precision, not in 8 bits", "take ddp, or train.precision bf16")
    if asked in ("fsdp", "hsdp") and train.optimizer_states == "int8":
        raise UserError("train.parallel", f"{asked} cannot split moments in int8", "take ddp, or train.optimizer_states fp32")
    if asked == "hsdp" and (world.nodes == 1 or world.neighbours == 1):
        sizes = " and ".join(str(size) for size in sorted({*world.local_sizes} or {world.local_size}))
        raise UserError(
            "train.parallel",
            f"hsdp with {world.nodes} nodes of {sizes} processes",
            "it needs two nodes, and equal groups of two or more on each; take fsdp",
        )
    whole = train.precision == "fp8" or train.optimizer_states == "int8"
    copies = Split("ddp", owners=owners(config, machine, world))
    if asked == "ddp" or (asked == "auto" and (whole or _fits(config, machine, copies))):
        return copies
    within_a_node = world.nodes > 1 and world.neighbours > 1
    in_a_node = Split("hsdp", world.neighbours)
    chosen = (
        in_a_node if asked == "hsdp" or (asked == "auto" and within_a_node and _fits(config, machine, in_a_node)) else Split("fsdp", size)
    )
    kept = chosen._replace(regathers=False)
    return kept if _fits(config, machine, kept) else chosen


def owners(config: RunConfig, machine: Machine, world: World) -> int:
    """Return among how many processes of a machine the rows of every weight are divided: all, where that can be done and helps.

    Between CPUs it does not: gloo scatters sums by sending all of them.
    """
    size = world.neighbours
    divisible = world.size % size == 0 and rows_divisor(config.model) % size == 0
    return size if divisible and machine.is_cuda and config.train.optimizer_states != "int8" else 1


def _fits(config: RunConfig, machine: Machine, split: Split) -> bool:
    rows = 1 if config.train.batch_size == "auto" else config.train.batch_size
    one = config.replaced(train={"batch_size": rows})
    return sum(predicted_memory(one, split).values()) <= USABLE_MEMORY * machine.memory_bytes


def spread_over(model: TrainingModel, config: RunConfig, machine: Machine, world: World, split: Split) -> nn.Module:
    """Return ``model`` as the processes share it: blocks are gathered one at a time where they are split, and gradients travel as asked.

    FSDP adds up micro-batches in the dtype in which it sends them, which would lose small gradients in bf16; and with several of them
    there is the less to send.
    """
    narrow = config.train.reduce_precision == "bf16" and not (split.is_sharded and config.train.grad_accum > 1)
    transformer = model.transformer
    one_machine = split.parallel == "ddp" and machine.is_cuda and world.nodes == 1
    at_once = one_machine and min(world.of_all(bus_bandwidth(machine, world))) > FAST
    return spread(
        model,
        world,
        split,
        units=() if at_once else transformer.blocks,
        # A tied head's rows are looked up in float32 as well.
        copied=[m for m in transformer.matrices if m.is_copied and m is not transformer.embedding],
        compute=runtime.compute_dtype(config.train.precision, machine),
        reduced=torch.bfloat16 if narrow else torch.float32,
    )


def accumulated(config: RunConfig, world: World) -> RunConfig:
    """Return ``config`` with the ``grad_accum`` that gives ``tokens_per_step``, where that is set; of rows, with ``batch_size`` auto.

    Raises:
        UserError: the processes cannot share so many tokens evenly.
    """
    train = config.train
    if train.tokens_per_step is None:
        return config
    rows = 1 if train.batch_size == "auto" else train.batch_size
    once = rows * train.seq_len * world.dp_size
    if train.tokens_per_step % once:
        near = max(1, round(train.tokens_per_step / once)) * once
        raise UserError(
            "train.tokens_per_step",
            f"{train.tokens_per_step:,} is not a multiple of {once:,} "
            f"(batch_size {rows} x seq_len {train.seq_len} x {sharers(config, world.size)})",
            f"set it to {near:,}, or choose another --batch_size or number of processes",
        )
    return config.replaced(train={"grad_accum": train.tokens_per_step // once})


def share_of(batch: Batch, world: World) -> Batch:
    """Return what this process reads of ``batch``: all, or where several read a row together its chunks of each."""
    return batch if world.context is None else batch.part(world.context.chunks(batch.tokens.shape[1]))


def as_asked(config: RunConfig) -> RunConfig:
    """Return ``config`` with ``grad_accum`` left to ``tokens_per_step`` again, where that is set: what is kept for another start."""
    if config.train.tokens_per_step is None:
        return config
    return config.replaced(train={"grad_accum": 1})
