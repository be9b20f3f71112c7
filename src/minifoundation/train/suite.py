"""What a run needs of benchmarks on the weights that it is training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from minifoundation.checkpoint import Checkpoint
from minifoundation.distributed import World
from minifoundation.runtime import Machine


class Suite(Protocol):
    """Benchmarks by the way of ``export_hf`` and ``eval``, which commands know and training does not."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the scores in metrics.csv."""

    def scores(self, checkpoint: Checkpoint, machine: Machine, world: World, told: Callable[[], bool]) -> dict[str, float | None] | None:
        """Return the score of ``checkpoint`` on each benchmark as a share, None for one that could not run; every process calls this.

        Returns None as a whole when one of the processes was ``told`` to stop before the end.
        """
