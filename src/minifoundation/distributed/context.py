"""Processes that read a row together (context parallelism): who has which tokens, and how all come to the keys and values of a whole row.

Letters: B rows, T tokens a row, K key/value heads, h head width, N processes. Why it is so: docs/decisions/0010-context-parallelism.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from minifoundation.distributed.world import World
from minifoundation.errors import UserError
from minifoundation.wording import processes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Context:
    """One of the N processes that read a row together, all of which go through the model at the same time.

    A row is cut into 2 N chunks, and process i has chunks i and 2 N - 1 - i: a later token attends to more, and so the work is the same
    for all (Llama 3, arXiv:2407.21783, section 3.3.2).

    Args:
        mesh: of these N processes.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.size = mesh.size()
        self.rank = mesh.get_local_rank()
        self._mesh = mesh

    def chunks(self, seq_len: int) -> list[tuple[int, int]]:
        """Return where the tokens of this process begin and end in a row of ``seq_len``, a multiple of 2 N, chunk by chunk."""
        length = seq_len // (2 * self.size)
        return [(number * length, (number + 1) * length) for number in (self.rank, 2 * self.size - 1 - self.rank)]

    def gathered(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, T, K, h) of whole rows, in order, from those of the tokens of each process, (B, T / N, K, h) each.

        The gradient of a process's own is the sum of those that all have for it.
        """
        from torch.distributed.tensor import DTensor, Partial, Shard

        mine = torch.stack((k, v))[None]  # sent as one
        parts = DTensor.from_local(mine, self._mesh, [Shard(0)], run_check=False).full_tensor(grad_placements=[Partial()])
        halves = [part.chunk(2, dim=2) for part in parts.unbind()]  # of each process: 2, B, half of its tokens, K, h
        rows = torch.cat([*(first for first, _ in halves), *(last for _, last in reversed(halves))], dim=2)
        keys, values = rows.unbind()
        return keys, values


def sharing_rows(world: World, size: int) -> World:
    """Return ``world`` with its processes in groups of ``size`` neighbours, each of which reads its rows together; all call this.

    Raises:
        UserError: they do not fall into such groups.
    """
    if size == 1:
        return world
    if world.size % size:
        remedy = "start a multiple of it with torchrun --nproc_per_node, or choose one that divides them"
        raise UserError("train.context_parallel", f"{size}, and there {'are' if world.size > 1 else 'is'} {processes(world.size)}", remedy)
    from torch.distributed.device_mesh import DeviceMesh

    mine, _ = dist.new_subgroups(group_size=size)  # with a communicator of its own: what is gathered does not queue behind gradients
    return replace(world, context=Context(DeviceMesh.from_group(mine, "cuda" if torch.cuda.is_available() else "cpu")))
