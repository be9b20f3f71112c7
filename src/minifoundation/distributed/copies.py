"""A copy of the model on every process, and of the optimizer a part: ZeRO stage 1 (arXiv:1910.02054) within each machine.

Why not torch's DistributedDataParallel: docs/decisions/0009-several-gpus.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minifoundation.distributed.world import World

# Several collectives as one, and the names that torch 2.13 gives to two of them.
_at_once: Any = dist._coalescing_manager  # type: ignore[attr-defined]
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Copies(nn.Module):
    """``module``, the same on every process, whose gradients are averaged over all of them.

    The processes of a machine divide the rows of every weight among them. Gradients are summed to the process that has the rows; it alone
    updates them and has their moments, and then gives them to the others (``put_together``). What the optimizer is to update is in
    ``parts``.

    Gradients travel on a stream of their own, a unit at a time, as soon as the backward has all of a unit.

    Args:
        owners: processes of a machine, among which rows are divided; 1: each process updates everything.
        units: submodules whose gradients travel at once; those of all the rest do together.
        reduced: the dtype in which gradients travel.

    Raises:
        ValueError: ``owners`` does not divide the rows of a weight.
    """

    def __init__(self, module: nn.Module, world: World, *, owners: int, units: Iterable[nn.Module] = (), reduced: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self._size, self._owners, self._reduced = world.size, owners, reduced
        self._sends = True
        weights = list(module.parameters())
        self._weights = weights
        device = weights[0].device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._near: Any = None
        self._far: Any = dist.group.WORLD
        self._mesh: Any = None
        self.parts: dict[nn.Parameter, nn.Parameter] = {weight: weight for weight in weights}
        """What of each weight this process updates."""
        if owners > 1:
            from torch.distributed.device_mesh import init_device_mesh

            nodes = world.size // owners
            mesh = init_device_mesh(device.type, (nodes, owners), mesh_dim_names=("node", "owner"))
            self._mesh = mesh["owner"]
            self._near, self._far = self._mesh.get_group(), mesh["node"].get_group() if nodes > 1 else None
            self._place = self._mesh.get_local_rank()
            self.parts = {weight: nn.Parameter(self._part(weight.detach())) for weight in weights}
        self._missing: list[set[nn.Parameter]] = []
        """Of each unit, the weights whose gradients are not complete yet."""
        taken: set[nn.Parameter] = set()
        for unit in [*units, module]:
            mine = [weight for weight in unit.parameters() if weight not in taken]
            taken.update(mine)
            self._missing.append(set(mine))
            for weight in mine:
                weight.register_post_accumulate_grad_hook(partial(self._arrived, mine, self._missing[-1]))

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

    def _arrived(self, unit: list[nn.Parameter], missing: set[nn.Parameter], weight: nn.Parameter) -> None:
        """Send the gradients of ``unit``, once that of ``weight`` is the last one."""
        if not self._sends:
            return
        missing.discard(weight)
        if not missing:
            missing.update(unit)
            self._send([weight.grad for weight in unit if weight.grad is not None])

    def _send(self, gradients: list[Tensor]) -> None:
        """Leave in the rows of this process the mean over all processes."""
        with self._beside():
            sent = [gradient.to(self._reduced) for gradient in gradients]
            if sent[0].is_cuda:
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

    def finish(self) -> None:
        """Put the gradients, once all have travelled, where the optimizer looks for them: at ``parts``."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        if self._near is not None:
            for weight, part in self.parts.items():
                gradient, weight.grad = weight.grad, None
                part.grad = None if gradient is None else self._part(gradient)

    @torch.no_grad()
    def put_together(self) -> None:
        """Give every process the rows that the others have updated."""
        if self._near is not None:
            with _at_once(self._near):
                for weight in self._weights:
                    _all_gather(weight.detach(), self._rows([weight.detach()])[0], self._near)
            torch.autograd.graph.increment_version(self._weights)

    def _rows(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the rows of this process, not copies."""
        return [tensor if self._near is None else tensor.chunk(self._owners)[self._place] for tensor in tensors]

    def _part(self, tensor: Tensor) -> Tensor:
        """Return this process's rows of ``tensor`` as a part of the whole, not a copy."""
        from torch.distributed.tensor import DTensor, Shard

        if len(tensor) % self._owners:
            raise ValueError(f"{self._owners} processes cannot divide {len(tensor)} rows")
        return DTensor.from_local(self._rows([tensor])[0], self._mesh, [Shard(0)], run_check=False)
