"""What processes that read a row together compute, held against what one computes alone; started by torchrun from test_context.py."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minifoundation.distributed import Context, Split, World, join, sharing_rows
from minifoundation.model.transformer import Transformer
from minifoundation.train.step import held_out_loss
from tests.distributed.equal import STEPS, Trained, batches, close, saved, settings

WAYS: dict[str, dict[str, Any]] = {
    "rows": {},
    "documents": {"mask_documents": True},
    "qk_norm": {"model": {"qk_norm": True}},
    "attention": {"model": {"checkpointing": "attention", "qk_norm": True}, "mask_documents": True},
    "full": {"model": {"checkpointing": "full"}},
}
"""The settings of runs; all have grouped queries, two micro-batches a step, clipping, z-loss and an average."""


def equal_to_one(world: World, ways: list[str], splits: list[Split], steps: int) -> None:
    """Losses, norms of gradients and weights of some steps, plain and by hand."""
    own = Transformer.by_hand_on
    for name in ways:
        run = settings(**WAYS[name])
        alone = Trained(World(), Split(), run)
        expected = torch.tensor(list(alone.steps(0, steps)))
        told = alone.checkpoint()
        for split in splits:
            for by_hand in (True,) if split.is_sharded else (False, True):
                Transformer.by_hand_on = _always if by_hand else own  # type: ignore[method-assign, assignment]
                together = Trained(world, split, run)
                found = torch.tensor(list(together.steps(0, steps)))
                what = f"{name}, {split.parallel}, {'by hand' if by_hand else 'plain'}, {world.cp_size} a row"
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=partial("{}: {}".format, what))
                close(told.tensors(), together.checkpoint().in_host_memory(kept=True).tensors(), 2e-5)
        Transformer.by_hand_on = own  # type: ignore[method-assign]


def _always(model: Transformer, x: Tensor) -> bool:
    return True


def others_would_show(world: World) -> None:
    """A fault in what travels is far outside the tolerances: keys and values that send no gradient back."""
    expected = torch.tensor(list(Trained(World(), Split(), settings()).steps(0, 3)))
    gathered = Context.gathered
    Context.gathered = lambda self, k, v: tuple(x.detach() for x in gathered(self, k, v))  # type: ignore[method-assign, assignment, return-value]
    found = torch.tensor(list(Trained(world, Split("ddp"), settings()).steps(0, 3)))
    Context.gathered = gathered  # type: ignore[method-assign]
    assert (found - expected).abs().max() > 1e-3


def goes_on_with_another_number(world: World, folder: Path, steps: int) -> None:
    """Half of the steps on as many, the rest on one, and the other way round, through a file."""
    one, run = World(), settings()
    expected = torch.tensor(list(Trained(one, Split(), run).steps(0, steps)))
    for number, (first, then) in enumerate([(world, one), (one, world)]):
        ways = [Split() if part.size == 1 else Split("ddp", owners=part.size) for part in (first, then)]
        half = Trained(first, ways[0], run)
        done = list(half.steps(0, steps // 2))
        state = saved(half, world, folder / f"{world.cp_size} a row, {number}")
        resumed = Trained(then, ways[1], run, state)
        close(state.tensors(), resumed.checkpoint().in_host_memory(kept=True).tensors(), 0.0)
        torch.testing.assert_close(torch.tensor([*done, *resumed.steps(steps // 2, steps)]), expected, atol=1e-5, rtol=1e-5)


def held_out_is_that_of_one(world: World) -> None:
    run = settings(mask_documents=True)
    rows = [batch for step in range(3) for batch in batches(World(), step, documents=True)][:5]  # no multiple of two
    alone, together = Trained(World(), Split(), run), Trained(world, Split("ddp"), run)
    nats, found = (held_out_loss(one.model, rows, one.world, torch.device("cpu")) for one in (alone, together))
    assert nats is not None and found is not None and abs(nats - found) < 1e-5


def half_precision(world: World) -> None:
    """Near what one process has in fp32."""
    expected = torch.tensor(list(Trained(World(), Split(), settings()).steps(0, STEPS)))
    for checkpointing in ("none", "attention", "full"):
        run = settings(precision="bf16", model={"checkpointing": checkpointing, "qk_norm": False})
        found = torch.tensor(list(Trained(world, Split("ddp", owners=world.size), run).steps(0, STEPS)))
        torch.testing.assert_close(found[:, :2], expected[:, :2], atol=0.03, rtol=0)
        torch.testing.assert_close(found[:, 2], expected[:, 2], atol=0.0, rtol=0.1)
    run = settings(precision="fp8", loss_chunk=16, model={"d_model": 32, "d_ff": 48, "vocab_size": 112})
    expected, found = (
        torch.tensor(list(Trained(one, split, run).steps(0, STEPS)))
        for one, split in ((World(), Split()), (world, Split("ddp", owners=world.size)))
    )
    torch.testing.assert_close(found[:, :2], expected[:, :2], atol=0.03, rtol=0)  # of all processes the largest value sets the scale
    torch.testing.assert_close(found[:, 2], expected[:, 2], atol=0.0, rtol=0.1)


def compiled(world: World) -> None:
    """Blocks compiled as they are where they are not by hand, the gathering and what is made again in one graph."""
    expected = torch.tensor(list(Trained(World(), Split(), settings()).steps(0, 3)))
    together = Trained(world, Split("ddp"), settings(model={"checkpointing": "attention"}))
    together.transformer.compile_blocks()
    torch.testing.assert_close(torch.tensor(list(together.steps(0, 3))), expected, atol=1e-5, rtol=1e-5)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, which = Path(sys.argv[1]), sys.argv[2]
    with join() as all_of_them:
        if which == "quick":
            both = sharing_rows(all_of_them, 2)
            equal_to_one(both, ["documents", "attention"], [Split("ddp")], steps=4)
            others_would_show(both)
            goes_on_with_another_number(both, folder, steps=4)
            held_out_is_that_of_one(both)
        elif which == "compiled":
            compiled(sharing_rows(all_of_them, 2))
        elif which == "half":
            half_precision(sharing_rows(all_of_them, 2))
        else:
            for size in (2, 4):
                world = sharing_rows(all_of_them, size)
                ddp, fsdp = Split("ddp"), Split("fsdp", world.size)
                equal_to_one(world, list(WAYS), [fsdp if size == 2 else ddp], steps=6)
                equal_to_one(world, ["documents"], [ddp, Split("hsdp", 2)] if size == 2 else [fsdp], steps=20)
                goes_on_with_another_number(world, folder, steps=6)
                held_out_is_that_of_one(world)
                half_precision(world)
        if all_of_them.is_first:
            print("all equal")
