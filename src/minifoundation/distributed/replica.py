"""A model of which every process has a replica, and a part of the optimizer: ZeRO stage 1 (arXiv:1910.02054) within each machine.

Why not torch's DistributedDataParallel: docs/decisions/0009-several-gpus.md.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minifoundation.distributed.world import World

# Several collectives as one, and the names that torch 2.13 gives to two of them.
_at_once: Any = dist._coalescing_manager  # type: ignore[attr-defined]
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Copied(Protocol):
    """A weight that a model uses as a copy in half precision, and not itself."""

    weight: nn.Parameter

    def new_rows(self) -> Tensor:
        """Return where the weight's rows are to be written in half precision."""

    def take(self, rows: Tensor) -> None:
        """Use ``rows``, from ``new_rows``, as the copy."""


class Replica(nn.Module):
    """``module``, the same on every process, with gradients that are means over all of them.

    The owners, processes of one machine, divide the rows of every weight among them. The mean gradient of a row goes to its owner, which
    alone updates the row and has its moments (``parts`` is what the optimizer is for), and then gives it to the others
    (``share_weights``).

    Gradients travel on a stream of their own, those of a unit at once, when the backward has made all of them.

    Args:
        owners: how many; 1: each process updates everything.
        units: submodules whose gradients travel at once; those of all the rest do together.
        copied: weights whose owners give the others copies in half precision. Rows of other owners are then not the newest in ``module``.
        reduced: the dtype in which gradients travel.

    Raises:
        ValueError: ``owners`` does not divide the rows of a weight.
    """

    def __init__(
        self,
        module: nn.Module,
        world: World,
        *,
        owners: int = 1,
        units: Iterable[nn.Module] = (),
        copied: Iterable[Copied] = (),
        reduced: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.module = module
        weights = list(module.parameters())
        device = weights[0].device
        self._size, self._owners, self._reduced = world.size, owners, reduced
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._sends = True
        self._copied = list(copied) if owners > 1 else []
        alone = {matrix.weight for matrix in self._copied}
        self._whole = [weight for weight in weights if weight not in alone]
        self._near: Any = None
        self._far: Any = dist.group.WORLD
        self.parts: dict[nn.Parameter, nn.Parameter] = {weight: weight for weight in weights}
        """What of each weight this process updates."""
        if owners > 1:
            mesh = world.groups(owners, device.type)
            self._mesh = mesh["member"]
            self._near, self._far = self._mesh.get_group(), mesh["group"].get_group() if world.size > owners else None
            self._place = self._mesh.get_local_rank()
            self.parts = {weight: nn.Parameter(self._part(weight.detach())) for weight in weights}
        self._units: list[list[nn.Parameter]] = []
        seen: set[nn.Parameter] = set()
        for unit in [*units, module]:
            self._units.append([weight for weight in unit.parameters() if weight not in seen])
            seen.update(self._units[-1])
        self._missing = [len(unit) for unit in self._units]
        """Of each unit, how many gradients are not complete yet."""
        for number, mine in enumerate(self._units):
            for weight in mine:
                weight.register_post_accumulate_grad_hook(_told(weakref.ref(self), number))

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    @contextmanager
    def local_gradients(self) -> Iterator[None]:
        """Have the backward inside add to the gradients of this process alone."""
        self._sends = False
        try:
            yield
        finally:
            self._sends = True

    def arrived(self, number: int) -> None:
        """Send the gradients of a unit, when the last of them has come."""
        if not self._sends:
            return
        self._missing[number] -= 1
        if self._missing[number] == 0:
            self._missing[number] = len(self._units[number])
            self._send([weight.grad for weight in self._units[number] if weight.grad is not None])

    def _send(self, gradients: list[Tensor]) -> None:
        """Leave in the rows of this process the means over all processes."""
        with self._beside():
            sent = [gradient.to(self._reduced) for gradient in gradients]
            if self._stream is not None:
                mean = dist.ReduceOp.AVG
            else:  # gloo has sums alone
                mean = dist.ReduceOp.SUM
                torch._foreach_div_(sent, self._size)
            mine = self._rows(sent)
            if self._near is not None:
                with _at_once(self._near):
                    for rows, whole in zip(mine, sent, strict=True):
                        _reduce_scatter(rows, whole, mean, self._near)
            if self._far is not None:
                with _at_once(self._far):
                    for rows in mine:
                        dist.all_reduce(rows, mean, self._far)
            if sent[0] is not gradients[0]:
                torch._foreach_copy_(self._rows(gradients), mine)

    def _beside(self) -> AbstractContextManager[Any]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return torch.cuda.stream(self._stream)

    def finish_gradients(self) -> None:
        """Put the gradients, once all have travelled, where the optimizer looks for them: at ``parts``."""
        assert self._missing == [len(unit) for unit in self._units], "a weight has no gradient, and those of its unit have not travelled"
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        if self._near is not None:
            for weight, part in self.parts.items():
                gradient, weight.grad = weight.grad, None
                part.grad = None if gradient is None else self._part(gradient)

    @torch.no_grad()
    def share_weights(self) -> None:
        """Give every process what of the weights the others have updated."""
        if self._near is None:
            return
        halves = [matrix.new_rows() for matrix in self._copied]
        if halves:
            torch._foreach_copy_(self._rows(halves), self._rows([matrix.weight.detach() for matrix in self._copied]))
        for tensors in (halves, [weight.detach() for weight in self._whole]):
            with _at_once(self._near):
                for tensor, rows in zip(tensors, self._rows(tensors), strict=True):
                    _all_gather(tensor, rows, self._near)
        for matrix, half in zip(self._copied, halves, strict=True):
            matrix.take(half)
        torch.autograd.graph.increment_version(self._whole)

    def _rows(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the rows of this process, not copies."""
        return [tensor if self._near is None else tensor.chunk(self._owners)[self._place] for tensor in tensors]

    def _part(self, tensor: Tensor) -> Tensor:
        """Return this process's rows of ``tensor`` as a part of the whole, not a copy."""
        from torch.distributed.tensor import DTensor, Shard

        if len(tensor) % self._owners:
            raise ValueError(f"{self._owners} processes cannot divide {len(tensor)} rows")
        return DTensor.from_local(self._rows([tensor])[0], self._mesh, [Shard(0)], run_check=False)


def _told(replica: weakref.ref[Replica], number: int) -> Callable[[Tensor], None]:
    """Return what a weight of a unit calls; it keeps nothing alive, since Python's collector does not see what a tensor's hooks hold."""

    def hook(_: Tensor) -> None:
        there = replica()
        if there is not None:
            there.arrived(number)

    return hook
