"""The batches of a run's steps, as soon as every process can read them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from minifoundation.data.batch import Batch, prefetch
from minifoundation.data.loader import POLL_SECONDS, micro_batches
from minifoundation.errors import UserError
from minifoundation.train.parallel import share_of
from minifoundation.train.state import Training

SILENT_SECONDS = 1.0
"""A longer wait for data is shown."""


class NoData(Exception):
    """A step's data will not come.

    Args:
        error: why; None when the run was told to stop while it waited.
        everywhere: raised on all processes at the same step.
    """

    def __init__(self, error: Exception | None, *, everywhere: bool) -> None:
        self.error = error
        self.everywhere = everywhere


class Feed:
    """Gives each process its micro-batches, step by step.

    Shards may still be being made, and the processes do not see a new one at the same moment. So they agree on how far all of them
    can read, whenever a step goes beyond what they agreed on last; a stop or a fault while they wait is agreed on in the same way.

    Args:
        told: whether this process has been told to stop.
    """

    def __init__(self, training: Training, told: Callable[[], bool], bar: tqdm[Any]) -> None:
        self._training = training
        self._told = told
        self._bar = bar
        self._reach = 0
        """Samples that every process can read."""

    @contextmanager
    def open(self) -> Iterator[Iterator[list[Batch]]]:
        """Give an iterator over the micro-batches of the steps to come, read ahead by a thread; leaving the context stops it."""
        training, train = self._training, self._training.config.train
        assert isinstance(train.batch_size, int)
        split = {"batch_size": train.batch_size, "grad_accum": train.grad_accum}
        starts = list(training.progress.places(training.plan.steps - training.progress.step, training.plan.samples_per_step))
        world = training.world
        rows = (micro_batches(training.loader, start, **split, rank=world.dp_rank, world_size=world.dp_size) for start in starts)
        steps = ([share_of(batch, world) for batch in micro] for micro in rows)
        with prefetch(steps, training.machine.device) as batches:
            try:
                yield self._handed_over(batches)
            finally:
                training.loader.stop()

    def wait_for_held_out(self) -> None:
        """Return when every process can read the held-out rows.

        Raises:
            NoData: they will not come.
        """
        self._agreed(lambda: int(self._training.held_out.ready()), 1)

    def _handed_over(self, batches: Iterator[list[Batch]]) -> Iterator[list[Batch]]:
        training = self._training
        size = training.plan.samples_per_step
        in_all = training.progress.end(training.plan.steps - training.progress.step, size)
        while True:
            end = training.progress.place(size) + size
            if end > self._reach:
                self._reach = self._agreed(lambda: training.loader.reach(in_all), end)
            try:
                micro = next(batches)
            except Exception as error:
                raise NoData(error, everywhere=False) from error
            yield micro

    def _agreed(self, level: Callable[[], int], needed: int) -> int:
        """Return the least ``level`` over the processes, once it is ``needed`` at least."""
        began = time.perf_counter()
        supply = self._training.supply
        while True:
            fault = supply.fault() if supply else None  # before the level: what was made until then is seen
            mine = 0
            try:
                mine = level()
            except (UserError, OSError) as error:
                fault = error
            # One process has nobody to agree with, and the device is not made to wait.
            device = self._training.machine.device if self._training.world.size > 1 else "cpu"
            votes = torch.tensor([mine, not self._told(), fault is None], dtype=torch.int64, device=device)
            least, going_on, working = self._training.world.least(votes).tolist()
            if least >= needed:
                return int(least)
            if not going_on:
                raise NoData(None, everywhere=True)
            if not working:
                try:
                    with self._training.world.together():
                        if fault is not None:
                            raise fault
                except (UserError, OSError) as error:
                    raise NoData(error, everywhere=True) from None
            self._training.watch.rest()  # all wait alike
            if time.perf_counter() - began > SILENT_SECONDS:
                self._bar.set_postfix_str("waiting for data")
            time.sleep(POLL_SECONDS)
