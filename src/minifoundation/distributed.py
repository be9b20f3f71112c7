"""These processes: who am I, how many are we, and what we compute together. Alone imports torch.distributed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minifoundation.errors import UserError

WAIT_FOR_RANK_ZERO = timedelta(hours=6)
"""Collectives may stand still this long: rank 0 prepares a corpus while the others wait."""


@dataclass(frozen=True)
class World:
    """The processes of a run; one process is a world of size 1."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """The processes on this machine."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Return the elementwise sum of ``values`` over all processes, on each of them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def least(self, values: Tensor) -> Tensor:
        """Return the elementwise minimum of ``values`` over all processes, on each of them."""
        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MIN)
        return values

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            dist.barrier()


def is_first_process() -> bool:
    """Return whether this is the first process, also before and after it is joined to the others."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def join() -> Iterator[World]:
    """Yield the World that torchrun's variables describe, or a World of one process without them."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        yield World()
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                "--nproc_per_node", f"{local_rank + 1} processes or more on {torch.cuda.device_count()} GPUs", "start one process a GPU"
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=WAIT_FOR_RANK_ZERO)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    finally:
        dist.destroy_process_group()


def spread(model: nn.Module, world: World) -> nn.Module:
    """Return ``model`` wrapped so that backward leaves the mean gradient over the processes in ``.grad``."""
    if world.size == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)


def local_gradients(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which backward adds to ``.grad`` on this process alone; forward must be inside it too."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
