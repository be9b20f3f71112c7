"""Before the first step: whether all processes are of one run, and how fast they are, one by one and together."""

from __future__ import annotations

import hashlib
import json
import socket
import statistics
from collections.abc import Mapping
from functools import cache
from operator import attrgetter
from pathlib import Path

import torch
from torch import nn

import minifoundation
from minifoundation.config import RunConfig, dotted_names
from minifoundation.data.loader import Loader
from minifoundation.distributed import World
from minifoundation.errors import UserError
from minifoundation.runtime import Machine
from minifoundation.train.ceilings import median_seconds
from minifoundation.wording import counted

BYTES = {"cuda": 2**28, "cpu": 2**20}
"""Of the tensor that is summed over all processes to measure their network."""
WIDTH = 8192
"""Of the square matrices whose product tells a slow GPU."""
SLOW = 1.15
"""How many times the median time of all a process may take."""


def same_run(config: RunConfig, world: World) -> None:
    """Refuse processes that have other settings, code or torch than the first one.

    Raises:
        UserError: on every process.
    """
    with world.together():
        mine = {name: str(attrgetter(name)(config)) for name in dotted_names(RunConfig)}
        mine |= {"the code of minifoundation": code_sha256(), "torch": torch.__version__}
        _alike(mine, world, "start all processes with the same command, files and versions")


def same_data(loader: Loader, sample: int, world: World) -> None:
    """Refuse processes that see other shards than the first one, or begin at another sample; how far they see may differ.

    Raises:
        UserError: on every process.
    """
    with world.together():
        seen = {}
        for name, samples in loader.sources.items():
            manifest = samples.order.shards.manifest
            seen[name] = [pair.train.sha256 for pair in manifest.pairs if pair.train]
        others = world.of_all(seen)
        known = {name: min(len(one.get(name, ())) for one in others) for name in seen}  # of each source by itself
        mine = {f"shards of {name}": _hash(seen[name][:count]) for name, count in known.items()}
        mine |= {f"tokenizer of {name}": one.order.shards.manifest.tokenizer_sha256 for name, one in loader.sources.items()}
        _alike({**mine, "the next sample": str(sample)}, world, "give all processes the same data.shards_dir and --out_dir")


@torch.no_grad()
def same_weights(model: nn.Module, world: World) -> None:
    """Refuse processes that have other weights than the first one.

    Raises:
        UserError: on every process.
    """
    if world.size == 1:
        return
    norms = torch.stack(torch._foreach_norm(list(model.parameters()))).double()
    least, most = world.least(norms.clone()), -world.least(-norms)
    with world.together():
        if not torch.equal(least, most):
            name = [name for name, _ in model.named_parameters()][int((least != most).nonzero()[0])]
            raise UserError(name, "has other values on some processes than on the first", "give all processes the same checkpoint")


def _alike(mine: Mapping[str, str], world: World, remedy: str) -> None:
    first, *others = world.of_all((socket.gethostname(), dict(mine)))
    for rank, (host, values) in enumerate(others, start=1):
        for name, value in values.items():
            if value != first[1].get(name):
                raise UserError(name, f"{value} on rank {rank} ({host}), and {first[1].get(name)} on rank 0 ({first[0]})", remedy)


def code_sha256() -> str:
    """Return one hash over the source of this package, short."""
    folder = Path(minifoundation.__file__).parent
    return _hash([path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))])


def _hash(texts: list[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]


def network(machine: Machine, world: World) -> list[str]:
    """Return lines for a person: how fast sums over all processes are, and which process is slow by itself."""
    if world.size == 1:
        return []
    rate = bus_bandwidth(machine, world)
    nodes = counted(world.nodes, "machine")
    summed = f"{BYTES[machine.device.type] >> 20} MiB are summed at {rate / 1e9:,.1f} GB/s (bus bandwidth)"
    lines = [f"  network  {world.size} processes on {nodes}: {summed}"]
    if not machine.is_cuda:
        return lines
    times = world.of_all((product_seconds(machine), socket.gethostname()))
    median = statistics.median(time for time, _ in times)
    for rank, (time, host) in enumerate(times):
        if time > SLOW * median:
            lines.append(
                f"warning: rank {rank} on {host} takes {time / median:.2f} times as long as the others for a product; all wait for it"
            )
    return lines


@cache
def bus_bandwidth(machine: Machine, world: World) -> float:
    """Return the bytes/s that each process sends while a tensor is summed over all: 2 (n - 1) / n of its bytes. Measured once."""
    n_bytes = BYTES[machine.device.type]
    values = torch.zeros(n_bytes // 4, device=machine.device)
    return 2 * (world.size - 1) / world.size * n_bytes / median_seconds(lambda: world.total(values), machine)


def product_seconds(machine: Machine) -> float:
    """Return what a square product of ``WIDTH`` in half precision takes on this process's GPU alone."""
    a = torch.ones(WIDTH, WIDTH, device=machine.device, dtype=torch.float16)
    return median_seconds(lambda: a @ a, machine)
