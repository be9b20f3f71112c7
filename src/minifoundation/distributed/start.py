"""From torchrun's variables to a World: meeting the other processes, and parting from them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from minifoundation.distributed.world import World
from minifoundation.errors import Stopped, UserError

MEETING = timedelta(seconds=60)
"""What a process has to start and to be reached within."""
IN_A_STEP = timedelta(minutes=10)
"""A collective on the device that stands still for longer ends the process; ``Watch`` has named the culprit long before."""
WORDS = timedelta(days=7)
"""Waits by word are as long as the work that they wait for: the first process may make shards for hours."""


def is_first_process() -> bool:
    """Return whether this is the first process, also before and after it is joined to the others."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def join() -> Iterator[World]:
    """Yield the World that torchrun's variables describe, or a World of one process without them.

    Raises:
        UserError: more processes than GPUs, or some that do not come.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield World()
        return
    local_rank = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                "--nproc_per_node", f"{local_rank + 1} processes or more on {torch.cuda.device_count()} GPUs", "start one process a GPU"
            )
        torch.cuda.set_device(local_rank)
        # The last collectives of each process are kept, and written where they are asked for, when one does not come to its end.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    store, rank, size = _met()
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else None
    dist.init_process_group(
        "nccl" if device else "gloo", store=store, rank=rank, world_size=size, timeout=IN_A_STEP if device else WORDS, device_id=device
    )
    words = dist.new_group(backend="gloo", timeout=WORDS) if device else dist.group.WORLD
    try:
        yield World(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), words, store)
    except Stopped as stop:
        stop.told = rank > 0
        _part()
        raise
    except (UserError, OSError) as error:
        told = getattr(error, "told", None)
        error.told = bool(told)  # type: ignore[union-attr]
        if told is not None:  # all of them leave
            _part()
        raise
    # What went wrong on this process alone leaves the others in a collective, and to take leave of them would be to wait for them.
    else:
        _part()


def _part() -> None:
    dist.destroy_process_group()


def _met() -> tuple[Any, int, int]:
    """Return torchrun's store, this process's rank and how many there are, once all have come."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    seconds = round(MEETING.total_seconds())
    try:
        store, rank, size = next(rendezvous("env://", timeout=MEETING))
    except (dist.DistError, RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0][:200]
        raise UserError(
            "MASTER_ADDR, MASTER_PORT",
            f"{where} was not reached within {seconds} s ({first})",
            "start the first node too, and see that its port is open to this one",
        ) from None
    store.set(f"here/{rank}", socket.gethostname())
    try:
        if rank == 0:
            try:
                store.wait([f"here/{other}" for other in range(size)], MEETING)
                store.set("met", "")
            except dist.DistError:
                store.set("met", ", ".join(str(other) for other in range(size) if not store.check([f"here/{other}"])))
        store.wait(["met"], 2 * MEETING)
        missing = store.get("met").decode()
    except dist.DistError:
        missing = "0"
    if missing:
        fault = UserError("torchrun", f"of {size} processes rank {missing} did not start within {seconds} s", "see what its node says")
        fault.told = rank > 0 and missing != "0"
        raise fault
    return store, rank, size
