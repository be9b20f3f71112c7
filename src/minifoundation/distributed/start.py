"""From torchrun's variables to a World: meeting the other processes, and parting from them."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from minifoundation import launch
from minifoundation.distributed.world import World, mesh_of_groups
from minifoundation.errors import Interrupted, Stopped, UserError
from minifoundation.wording import counted, processes

MEETING = timedelta(seconds=60)
"""What a process has to start and to be reached within."""
IN_A_STEP = timedelta(minutes=10)
"""A collective on the device that stands still for longer ends the process; ``Watch`` has named the culprit long before."""
WORDS = timedelta(days=7)
"""Waits by word are as long as the work that they wait for: the first process may make shards for hours."""


def is_first_process() -> bool:
    """Return whether this is the first process, also before and after it is joined to the others."""
    return launch.number("RANK", without=0) == 0


@contextmanager
def join(*, with_gpu: bool = True) -> Iterator[World]:
    """Yield the World that torchrun's variables describe, or a World of one process without them.

    Args:
        with_gpu: each process takes a GPU where there are some; without, they only talk.

    Raises:
        UserError: more processes than GPUs, some that do not come, or variables that are not torchrun's.
    """
    if launch.world_size() == 1:
        yield World()
        return
    local_rank = launch.number("LOCAL_RANK")
    with_gpu = with_gpu and torch.cuda.is_available()
    if with_gpu:
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                "--nproc_per_node",
                f"{processes(local_rank + 1)} or more on {counted(torch.cuda.device_count(), 'GPU')}",
                "start one process a GPU",
            )
        torch.cuda.set_device(local_rank)
        # The last collectives of each process are kept, and written where they are asked for, when one does not come to its end.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    store, rank, size = _met()
    device = torch.device("cuda", local_rank) if with_gpu else None
    dist.init_process_group(
        "nccl" if device else "gloo", store=store, rank=rank, world_size=size, timeout=IN_A_STEP if device else WORDS, device_id=device
    )
    words = dist.new_group(backend="gloo", timeout=WORDS) if device else dist.group.WORLD
    try:
        alone = World(rank, size, local_rank, launch.number("LOCAL_WORLD_SIZE", without=1), words, store)
        yield replace(alone, local_sizes=tuple(found for place, found in alone.of_all((local_rank, alone.local_size)) if place == 0))
    except (Stopped, Interrupted) as stop:
        stop.told = rank > 0
        _part()
        raise
    except (UserError, OSError) as error:
        told = getattr(error, "told", None)
        error.told = _told_by_another(store) if told is None else told  # type: ignore[union-attr]
        if told is not None:  # all of them leave, with their own exit code: torchrun ends the others as soon as one has left
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            dist.barrier(group=words)
        raise
    # After a fault the groups are left as they are: what went wrong on this process alone leaves the others in a collective, and to take
    # leave of them would be to wait for them; and taking groups down now and then aborts a process, whose exit code is then another.
    else:
        _part()


def _told_by_another(store: Any) -> bool:
    """Return whether another process has said what it alone ends by: that memory runs out, as a rule, they find together."""
    with suppress(dist.DistError):  # the first process may hold the store itself, and be gone
        return bool(store.add("told", 1) > 1)
    return False


def _part() -> None:
    mesh_of_groups.cache_clear()  # groups that outlive this are taken down with Python
    dist.destroy_process_group()


def _met() -> tuple[Any, int, int]:
    """Return the store that all share, this process's rank and how many there are, once all have come."""
    rank, size = launch.number("RANK"), launch.world_size()
    host, port = os.environ.get("MASTER_ADDR", "localhost"), launch.number("MASTER_PORT", without=29500)
    seconds = round(MEETING.total_seconds())
    of_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store: Any
    try:
        store = TCPStore(host, port, size, rank == 0 and not of_torchrun, MEETING, wait_for_workers=False)
    except (dist.DistError, RuntimeError) as error:
        raise UserError(
            "MASTER_ADDR, MASTER_PORT",
            f"{host}:{port} was not reached within {seconds} s ({str(error).splitlines()[0][:120]})",
            "start the first node too, and see that its port is open to this one",
        ) from None
    if of_torchrun:  # it outlives the processes: what they said in a start that failed is not taken for new
        store = PrefixStore(f"start/{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    store.set(f"here/{rank}", socket.gethostname())
    missing = "0"
    with suppress(dist.DistError):
        if rank == 0:
            with suppress(dist.DistError):
                store.wait([f"here/{other}" for other in range(size)], MEETING)
            store.set("missing", ", ".join(str(other) for other in range(size) if not store.check([f"here/{other}"])))
        store.wait(["missing"], 2 * MEETING)
        missing = store.get("missing").decode()
    if missing:
        fault = UserError("torchrun", f"of {size} processes rank {missing} did not start within {seconds} s", "see what its node says")
        fault.told = rank > 0 and missing != "0"
        raise fault
    return store, rank, size
