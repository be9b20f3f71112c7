"""Two processes, the GPU of one of which has less room: started by torchrun from test_split.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from minifoundation.config import RunConfig
from minifoundation.distributed import join
from minifoundation.train import finder
from minifoundation.train.finder import steps_fit, with_batch_size
from tests.distributed.equal import settings
from tests.pretended import Pretended


def main() -> None:
    machine, patch = Pretended(torch.device("cpu"), "GPU", 2**36, None), pytest.MonkeyPatch()
    with join() as world:

        def tried(run: RunConfig, *_: Any, **__: Any) -> None:
            assert isinstance(run.train.batch_size, int)
            short_of_memory = run.train.batch_size > 4 and world.rank == 1
            if short_of_memory and not after_the_step:
                raise torch.OutOfMemoryError("CUDA out of memory")
            world.total(torch.ones(3))
            if short_of_memory:
                raise torch.OutOfMemoryError("CUDA out of memory")

        patch.setattr(finder, "trial", tried)
        asked = settings(batch_size="auto", grad_accum=16)
        after_the_step = True
        found = with_batch_size(asked, machine, lambda one: steps_fit(one, machine, world, lambda _: None))
        assert world.of_all((found.train.batch_size, found.train.grad_accum)) == [(4, 4)] * 2
        if world.is_first:
            print("agreed", flush=True)
        dist.barrier()
        after_the_step = False  # the other one waits for its gradients
        patch.setattr(finder, "PATIENCE", 1.0)
        with_batch_size(asked, machine, lambda one: steps_fit(one, machine, world, lambda _: None))


if __name__ == "__main__":
    main()
