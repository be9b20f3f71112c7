"""How a model is spread over processes: a copy on each, or a part (FSDP2). Why two: docs/decisions/0009-several-gpus.md."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from minifoundation.distributed.replica import Copied, Replica
from minifoundation.distributed.world import World

Parallel = Literal["none", "ddp", "fsdp", "hsdp"]


class Split(NamedTuple):
    """How the model lies on the processes."""

    parallel: Parallel = "none"
    """none: one process; ddp: a copy on each; fsdp: a part on each; hsdp: a part on each of a node, every node alike."""
    shards: int = 1
    """Parts that weights, gradients and the optimizer's moments are in."""
    owners: int = 1
    """Processes among which a copy's rows are divided: each updates its own and has their moments."""
    regathers: bool = True
    """Whether the gathered weights of a block are given up after its forward, and gathered again for its backward."""

    @property
    def is_sharded(self) -> bool:
        return self.parallel in ("fsdp", "hsdp")

    @property
    def optimizer_shards(self) -> int:
        """Parts that moments and averages are in."""
        return self.shards if self.is_sharded else self.owners


def spread(
    model: nn.Module,
    world: World,
    split: Split,
    *,
    units: Iterable[nn.Module] = (),
    copied: Iterable[Copied] = (),
    compute: torch.dtype = torch.float32,
    reduced: torch.dtype = torch.float32,
) -> nn.Module:
    """Return ``model``, the same on every process, such that gradients are means over them after ``finish_gradients``.

    Args:
        units: the modules whose gradients travel at once, and whose weights are gathered at once where they are split; the rest of
            ``model`` is one more.
        copied: the weights that the model uses as copies in half precision alone.
        compute: what weights are gathered in, where they are split.
        reduced: what gradients travel in.
    """
    match split.parallel:
        case "none":
            return model
        case "ddp":
            return Replica(model, world, owners=split.owners, units=units, copied=copied, reduced=reduced)
        case "fsdp" | "hsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

            device = next(model.parameters()).device.type
            mesh = init_device_mesh(device, (world.size,)) if split.parallel == "fsdp" else world.groups(split.shards, device)
            # What a block by hand returns is a view, and nothing writes to it.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
            policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduced, cast_forward_inputs=False)
            for unit in units:
                fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=split.regathers)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            return model


def trained(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return what this process's optimizer updates of the ``weights`` of ``model``, which ``spread`` returned, by the same names."""
    return {name: model.parts[weight] if isinstance(model, Replica) else weight for name, weight in weights.items()}


def local_gradients(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which backward adds to the gradients of this process alone; forward must be inside it too."""
    if isinstance(model, Replica):
        return model.local_gradients()
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported before something is split
    return _unreduced(model) if fsdp and isinstance(model, fsdp.FSDPModule) else nullcontext()


def finish_gradients(model: nn.Module) -> None:
    """Leave in ``.grad`` of what is ``trained`` the means over all processes, after the last backward of a step."""
    if isinstance(model, Replica):
        model.finish_gradients()


def share_weights(model: nn.Module) -> None:
    """Give every process what the others have updated, after a step of their optimizers."""
    if isinstance(model, Replica):
        model.share_weights()


@contextmanager
def _unreduced(model: Any) -> Iterator[None]:
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
