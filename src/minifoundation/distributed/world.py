"""The processes of a run, and what they tell each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from minifoundation.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from minifoundation.distributed.context import Context

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run; one process is a world of size 1.

    Tensors are summed by the device's own collectives, which may not stand still for long. What takes a process minutes or hours (making
    shards, writing to a slow disk) is waited for by words: ``agreed``, ``together`` and ``wait``, over the hosts' network.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """The processes on this machine."""
    words: Any = field(default=None, repr=False, compare=False)
    """The group that waits and small objects go by; None for one process."""
    store: Any = field(default=None, repr=False, compare=False)
    """torchrun's table of keys and values; None for one process."""
    context: Context | None = field(default=None, repr=False, compare=False)
    """The processes that read a row together with this one; None: each has rows of its own."""
    local_sizes: tuple[int, ...] = ()
    """The processes on each machine; empty: as many as on this one."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def cp_size(self) -> int:
        """How many processes read a row together (context parallelism)."""
        return 1 if self.context is None else self.context.size

    @property
    def dp_size(self) -> int:
        """How many have rows of their own (data parallelism): processes, or groups of them that read theirs together."""
        return self.size // self.cp_size

    @property
    def dp_rank(self) -> int:
        """Which of these this process belongs to."""
        return self.rank // self.cp_size

    @property
    def nodes(self) -> int:
        return len(self.local_sizes) or self.size // self.local_size

    @property
    def neighbours(self) -> int:
        """Processes in the largest groups of equal size that lie on one machine each: all of a machine, where each has as many."""
        return math.gcd(self.local_size, *self.local_sizes)

    def groups(self, size: int, device_type: str) -> DeviceMesh:
        """Return the processes as a mesh of groups of ``size`` neighbours, with the dimensions "group" and "member".

        It is made once: communicators take device memory that is not given back, and a trial of some rows or a run that goes back
        shares its model anew.
        """
        return mesh_of_groups(dist.group.WORLD, self.size // size, size, device_type)

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
            dist.barrier(group=self.words)

    def of_all(self, value: T) -> list[T]:
        """Return the ``value`` of every process, by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.words)
        return found

    def agreed(self, work: Callable[[], T]) -> T:
        """Return on every process what ``work`` returns on the first one, which alone calls it.

        Raises:
            UserError, OSError: what ``work`` raised, on every process.
        """
        if self.size == 1:
            return work()
        told: list[Any] = [None, None]
        if self.is_first:
            try:
                told[0] = work()
            except (UserError, OSError) as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0, group=self.words)
        value, fault = told
        if fault is not None:
            raise self._everywhere(fault)
        result: T = value
        return result

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do what is inside on every process; a UserError or OSError of one is raised on all of them, that of the lowest rank."""
        if self.size == 1:
            yield
            return
        mine: Exception | None = None
        try:
            yield
        except (UserError, OSError) as error:
            mine = error
        faults = [error for error in self.of_all(mine) if error is not None]
        if faults:
            raise self._everywhere(faults[0])

    def _everywhere(self, error: Exception) -> Exception:
        """Return ``error``, which all processes raise now and the first one prints."""
        error.told = not self.is_first  # type: ignore[attr-defined]
        return error


@cache
def mesh_of_groups(_everyone: Any, groups: int, size: int, device_type: str) -> DeviceMesh:
    """Return the mesh of ``World.groups``; the same one until the processes part."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device_type, (groups, size), mesh_dim_names=("group", "member"))
