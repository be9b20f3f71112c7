"""What two processes compute together, held against what one of them computes alone; started by torchrun from test_split.py."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import distributed_c10d

from minifoundation import config, runtime
from minifoundation.checkpoint import Checkpoint, Saver, load_checkpoint
from minifoundation.config import RunConfig
from minifoundation.data.batch import Batch
from minifoundation.distributed import Split, World, join, trained, whole
from minifoundation.errors import UserError
from minifoundation.model.matrix import refresh
from minifoundation.model.training import TrainingModel
from minifoundation.model.transformer import Transformer
from minifoundation.train.ema import Average
from minifoundation.train.kernels import Kernels, transformer_for
from minifoundation.train.optimizer import adamw, optimizer_state, restore_optimizer
from minifoundation.train.parallel import share_of, spread_over
from minifoundation.train.state import Progress
from minifoundation.train.step import StepStats, held_out_loss, settle, train_step

STEPS, ROWS, LENGTH = 20, 4, 16
EOS = 7
"""A token that ends a document where attention stays within them: one in a hundred."""
MODEL = {"d_model": 24, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "head_dim": 8, "d_ff": 40, "vocab_size": 104, "original_seq_len": LENGTH}


def settings(*, model: dict[str, Any] | None = None, mask_documents: bool = False, **train: Any) -> RunConfig:
    values = {"tokens": 10**6, "seq_len": LENGTH, "grad_accum": 2, "z_loss": 1e-2, "loss_chunk": 7, "ema": 0.9, "grad_clip": 0.3}
    data = {"source": "x", "mask_documents": mask_documents}
    return config.build(RunConfig, {"model": MODEL | (model or {}), "data": data, "train": {**values, **train}}, "test")


def batches(world: World, step: int, *, documents: bool = False) -> list[Batch]:
    """Return the micro-batches of a process: together those of the one process that has all rows."""
    rows = torch.randint(0, 100, (2, ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    mine = ROWS // world.dp_size
    parts = rows[:, world.dp_rank * mine : (world.dp_rank + 1) * mine]
    return [share_of(Batch.of_rows(part.numpy(), mask_documents=documents, eos=EOS), world) for part in parts]


class Trained:
    """A model and what trains it."""

    def __init__(self, world: World, split: Split, run: RunConfig, state: Checkpoint | None = None) -> None:
        machine = runtime.machine()
        self.world, self.run = world, run
        self.transformer: Transformer = transformer_for(run, machine, Kernels("math", "own"), split, world.context)
        if state is None:
            self.transformer.initialise(1)
        else:
            self.transformer.load_state_dict(state.model)
        self.model = spread_over(TrainingModel(self.transformer, z_loss=1e-2, chunk=7), run, machine, world, split)
        self.weights = trained(self.model, dict(self.transformer.named_parameters()))
        self.optimizer = adamw(self.weights, run.train)
        self.average = Average(self.weights, 0.9, state.ema if state else None)
        if state is not None:
            restore_optimizer(self.optimizer, self.names, state.optimizer)

    @property
    def names(self) -> dict[torch.Tensor, str]:
        return {weight: name for name, weight in self.weights.items()}

    def steps(self, first: int, last: int, scaler: torch.amp.GradScaler | None = None) -> Iterator[tuple[float, ...]]:
        scales = self.transformer.scales
        for step in range(first, last):
            micro = batches(self.world, step, documents=self.run.data.mask_documents)
            settle(self.model, scales, micro[0], tokens=2 * ROWS * LENGTH, world=self.world)
            stats: StepStats = train_step(
                self.model,
                self.optimizer,
                scaler or torch.amp.GradScaler("cpu", enabled=False),
                micro,
                lr=3e-3,
                grad_clip=0.3,
                tokens=2 * ROWS * LENGTH,
                world=self.world,
                scales=scales,
            )
            self.average.update(step + 1, stats.taken)
            yield tuple(stats.read()[:3])

    def checkpoint(self) -> Checkpoint:
        return Checkpoint(
            self.run,
            self.transformer.state_dict(),
            b"",
            Progress(step=1).as_dict(),
            ema=self.average.state(),
            optimizer=optimizer_state(self.optimizer, self.names),
        )


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=tolerance, rtol=0, msg=name)


def same_training(world: World, folder: Path) -> None:
    alone = Trained(World(), Split(), settings())
    expected = list(alone.steps(0, STEPS))
    clipped = sum(norm > 0.3 for _, _, norm in expected)
    assert clipped > 5, "the steps are there to be clipped"
    told = alone.checkpoint()
    held_out = [batch for step in range(3) for batch in batches(World(), step)][:5]  # no multiple of two
    nats = held_out_loss(alone.model, held_out, World(), torch.device("cpu"))
    for split in (Split("ddp"), Split("ddp", owners=world.size), Split("fsdp", world.size)):
        both = Trained(world, split, settings())
        groups = process_groups()
        torch.testing.assert_close(torch.tensor(list(both.steps(0, STEPS))), torch.tensor(expected), atol=1e-5, rtol=1e-5)
        found = both.checkpoint().in_host_memory(kept=True)
        close(told.tensors(), found.tensors(), 2e-5)
        loss = held_out_loss(both.model, held_out, world, torch.device("cpu"))
        assert nats is not None and loss is not None and abs(nats - loss) < 1e-5
        # Half-way in one way of sharing and on in another, through a file that the first process writes.
        half = Trained(world, split, settings())
        first = list(half.steps(0, STEPS // 2))
        state = saved(half, world, folder / f"{split.parallel}-{split.owners}")
        for other in (
            [Split(), Split("fsdp", world.size)]
            if split.parallel == "ddp"
            else [Split("ddp", owners=world.size), split._replace(regathers=False)]
        ):
            on = world if other.parallel != "none" else World()
            resumed = Trained(on, other, settings(), state)
            close(state.tensors(), resumed.checkpoint().in_host_memory(kept=True).tensors(), 0.0)
            rest = list(resumed.steps(STEPS // 2, STEPS))
            torch.testing.assert_close(torch.tensor([*first, *rest]), torch.tensor(expected), atol=1e-5, rtol=1e-5)
        assert process_groups() == groups, "what is shared anew, after a trial or going back, has no groups of its own"


def process_groups() -> int:
    return len(distributed_c10d._world.pg_map)


def saved(of: Trained, world: World, folder: Path) -> Checkpoint:
    """Return what is read again of a checkpoint that the first process has written, in the background."""
    world.agreed(folder.mkdir)
    checkpoint = of.checkpoint()
    saver = Saver(folder, keep=1, keep_every=None, background=True, if_fails="stop", say=print)
    if world.is_first:
        saver.write(checkpoint)
        saver.close()
    else:
        for _ in checkpoint.gathered():
            pass
    world.wait()
    return load_checkpoint(folder / "step_00000001")


def nodes(world: World) -> None:
    """Two machines of two owners: sums within and over them, in float32 and, of copies, in bf16; and a checkpoint of the parts."""
    alone = Trained(World(), Split(), settings())
    expected = torch.tensor(list(alone.steps(0, 6)))
    both = Trained(world, Split("ddp", owners=2), settings())
    torch.testing.assert_close(torch.tensor(list(both.steps(0, 6))), expected, atol=1e-5, rtol=1e-5)
    close(alone.checkpoint().tensors(), both.checkpoint().in_host_memory(kept=True).tensors(), 2e-5)
    other = {"tie_embeddings": False, "qk_norm": True}
    for reduced, model in (("fp32", {}), ("bf16", {}), ("fp32", other)):
        expected = torch.tensor(list(Trained(World(), Split(), settings(model=model)).steps(0, 6)))
        half = Trained(world, Split("ddp", owners=2), settings(model=model, precision="bf16", reduce_precision=reduced))
        found = torch.tensor(list(half.steps(0, 6)))
        torch.testing.assert_close(found[:, :2], expected[:, :2], atol=0.03, rtol=0)
        copies_are_of_the_owners(half)


def copies_are_of_the_owners(trained: Trained) -> None:
    refresh(trained.transformer.matrices)  # of the embedding; others have been given their copies
    weights = {weight: whole(trained.weights[name]) for name, weight in trained.transformer.named_parameters()}
    for matrix in trained.transformer.matrices:
        if matrix.copy is not None:
            assert torch.equal(matrix.copy, weights[matrix.weight].to(matrix.copy.dtype))
    assert torch.equal(trained.transformer.embedding.weight, weights[trained.transformer.embedding.weight])


def half_precision(world: World) -> None:
    """bf16 by hand and not, and gradients that travel in bf16: near what one process has, which rounds elsewhere."""
    expected = torch.tensor(list(Trained(World(), Split(), settings()).steps(0, STEPS)))
    by_hand = Transformer.by_hand_on
    for forced in (False, True):
        Transformer.by_hand_on = (lambda self, x: True) if forced else by_hand  # type: ignore[method-assign]
        for split in (Split("ddp"), Split("ddp", owners=world.size), Split("fsdp", world.size)):
            for reduced in ("fp32", "bf16"):
                run = settings(precision="bf16", reduce_precision=reduced)
                both = Trained(world, split, run)
                found = torch.tensor(list(both.steps(0, STEPS)))
                if split.owners > 1:
                    copies_are_of_the_owners(both)
                torch.testing.assert_close(found[:, :2], expected[:, :2], atol=0.03, rtol=0)
                torch.testing.assert_close(found[:, 2], expected[:, 2], atol=0.0, rtol=0.1)
    Transformer.by_hand_on = by_hand  # type: ignore[method-assign]


def an_overflow_is_skipped_by_all(world: World) -> None:
    expected = torch.tensor(list(Trained(World(), Split(), settings()).steps(0, 9)))
    for split in (Split("ddp"), Split("ddp", owners=world.size), Split("fsdp", world.size)):
        both = Trained(world, split, settings(precision="fp16"))
        before = {name: whole(weight).clone() for name, weight in both.transformer.named_parameters()}
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30)
        list(both.steps(0, 1, scaler))
        close(before, {name: whole(weight) for name, weight in both.transformer.named_parameters()}, 0.0)
        found = torch.tensor(list(both.steps(0, 9, scaler)))
        torch.testing.assert_close(found, expected, atol=0.03, rtol=0.1)


def a_fault_is_raised_on_all(world: World) -> None:
    def fails() -> None:
        raise UserError("here", "wrong", "mend it")

    for attempt in (partial(world.agreed, fails), partial(one_fails, world, fails)):
        with pytest.raises(UserError, match=r"^here: wrong; mend it$") as caught:
            attempt()
        assert caught.value.told is (world.rank > 0)
    assert world.agreed(lambda: world.rank) == 0 and world.of_all(world.rank) == list(range(world.size))


def one_fails(world: World, fails: Any) -> None:
    with world.together():
        if world.rank == 1:
            fails()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with join() as world:
        a_fault_is_raised_on_all(world)
        if world.size == 4:
            nodes(world)
        elif sys.argv[2] == "fp32":
            same_training(world, Path(sys.argv[1]))
        else:
            half_precision(world)
            an_overflow_is_skipped_by_all(world)
        if world.is_first:
            print("all equal")
