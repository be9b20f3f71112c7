"""How a model is spread over processes: a copy on each (DDP), or a part (FSDP2). Why two: docs/decisions/0009-several-gpus.md."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minifoundation.distributed.world import World

Parallel = Literal["none", "ddp", "fsdp", "hsdp"]


BUCKET_MIB = 64
"""Gradients that travel at once: torch's 25 are so few that two H200 send at 168 GB/s, of the 297 that 256 MiB do (benchmarks/scaling.py);
and the last ones, the tied embedding's, are waited for together with what is in their bucket."""


class Split(NamedTuple):
    """How the model lies on the processes."""

    parallel: Parallel = "none"
    """none: one process; ddp: a copy on each; fsdp: a part on each; hsdp: a part on each of a node, every node alike."""
    shards: int = 1
    """Parts that weights, gradients and the optimizer's moments are in."""
    regathers: bool = True
    """Whether the gathered weights of a block are given up after its forward, and gathered again for its backward."""

    @property
    def is_sharded(self) -> bool:
        return self.parallel in ("fsdp", "hsdp")


def spread(
    model: nn.Module,
    world: World,
    split: Split,
    *,
    units: Iterable[nn.Module] = (),
    compute: torch.dtype = torch.float32,
    reduced: torch.dtype = torch.float32,
) -> nn.Module:
    """Return ``model``, the same on every process, so that its backward leaves the mean gradient over them in ``.grad``.

    Args:
        units: the modules whose weights are gathered, one after the other, where they are split; the rest of ``model`` is gathered once.
        compute: what weights are gathered in, where they are split.
        reduced: what gradients travel in.
    """
    match split.parallel:
        case "none":
            return model
        case "ddp":
            with warnings.catch_warnings():  # torch 2.13 has another name for it, 2.11 does not know that one
                warnings.simplefilter("ignore", FutureWarning)
                copy = DistributedDataParallel(
                    model, bucket_cap_mb=BUCKET_MIB, gradient_as_bucket_view=True, broadcast_buffers=False, init_sync=False
                )
            if reduced == torch.bfloat16:
                copy.register_comm_hook(None, _in_bf16)
            return copy
        case "fsdp" | "hsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            device = next(model.parameters()).device.type
            nodes = world.size // split.shards
            if split.parallel == "fsdp":
                mesh = init_device_mesh(device, (world.size,), mesh_dim_names=("shard",))
            else:
                mesh = init_device_mesh(device, (nodes, split.shards), mesh_dim_names=("replicate", "shard"))
            # What a block by hand returns is a view, and nothing writes to it.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
            policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduced, cast_forward_inputs=False)
            for unit in units:
                fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=split.regathers)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            return model


def _in_bf16(group, bucket):  # type: ignore[no-untyped-def]  # torch compares annotations with its own
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

    return bf16_compress_hook(group, bucket)  # by another name: by its own torch takes it with NCCL alone


def local_gradients(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which backward adds to the gradients of this process alone; forward must be inside it too."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported before something is split
    return _unreduced(model) if fsdp and isinstance(model, fsdp.FSDPModule) else nullcontext()


@contextmanager
def _unreduced(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
