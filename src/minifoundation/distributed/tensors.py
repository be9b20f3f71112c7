"""Tensors of which every process holds a part, by FSDP's rows: the whole of one, and a part of a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor on every process, each of which has to call this; one that is not split is returned as it is."""
    return tensor.detach().full_tensor() if is_split(tensor) else tensor.detach()  # type: ignore[attr-defined]


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, not a copy."""
    return tensor.detach().to_local() if is_split(tensor) else tensor.detach()  # type: ignore[attr-defined]


@torch.no_grad()
def part_of(full: Tensor, like: Tensor) -> Tensor:
    """Return ``full``, which every process has, on the device and split as ``like`` is; nothing is sent."""
    there = full.detach().to(like.device)
    if not is_split(like):
        return there
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


def is_split(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether each process holds a part of a tensor."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor  # a second to import, and of no use to a run of one process

    return isinstance(tensor, DTensor)
