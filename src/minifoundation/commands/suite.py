"""Benchmarks during training: the model in memory as ``export_hf`` would write it, through ``eval``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minifoundation.checkpoint import Checkpoint
from minifoundation.config import EvalConfig, RunConfig
from minifoundation.distributed import World
from minifoundation.errors import UserError
from minifoundation.evaluate.requests import Request, read_tasks
from minifoundation.runtime import Machine
from minifoundation.train.suite import Suite


def suite_for(config: RunConfig) -> Suite | None:
    """Return the benchmarks that ``config`` asks for during training, None without.

    Raises:
        UserError: one that does not exist or whose data cannot be read, before anything is trained.
    """
    if config.eval.every_steps is None:
        return None
    return LiveSuite(config.eval)


class LiveSuite:
    """The tasks of ``config``, on the weights of a run."""

    def __init__(self, config: EvalConfig) -> None:
        self._config = config
        self._requests = [_allowed(request) for request in read_tasks(config.tasks)]
        if config.data_dir is not None and not config.data_dir.is_dir():
            raise UserError(
                "eval.data_dir", f"{config.data_dir}: no such folder", "give a mirror folder, or leave it out to read from the hub"
            )
        try:
            from minifoundation.evaluate import harness
        except ImportError as error:
            raise UserError("lm-eval", f"is not installed ({error})", "pip install -e '.[eval]', or leave eval.every_steps out") from None
        harness.quieten()
        self._manager = harness.task_manager(self._requests)
        for request in self._requests:  # a benchmark that cannot be read is better known now than after the first thousand steps
            harness.loaded_tasks(self._manager, request, data_dir=config.data_dir)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(f"eval/{request.label}" for request in self._requests)

    def scores(self, checkpoint: Checkpoint, machine: Machine, world: World, told: Callable[[], bool]) -> dict[str, float | None] | None:
        """As ``Suite.scores``; in bf16, on a CPU in float32, as ``eval`` takes a checkpoint."""
        from minifoundation.commands.native import in_memory
        from minifoundation.evaluate import harness
        from minifoundation.evaluate.model import DTYPES, Loaded, Model, Share, Source

        found: dict[str, float | None] = {}
        with in_memory(checkpoint, dtype=DTYPES["bf16" if machine.is_cuda else "fp32"], ema=self._config.ema) as inside:
            machine.forget()
            network: Any = inside.network.to(machine.device)
            loaded = Loaded(network, inside.tokenizer, Source("in training", inside.folder, {}))
            model = Model(loaded, rows=None, share=Share(world.rank, world.size, world.of_all))
            running = harness.run(
                model, self._manager, self._requests, limit=self._config.limit, data_dir=self._config.data_dir, code=False
            )
            for column in self.columns:
                if any(world.of_all(told())):
                    return None
                found[column] = next(running)[0].score
        return found


def _allowed(request: Request) -> Request:
    if request.row.runs_code or request.row.lengths:
        what = "runs programs" if request.row.runs_code else "has a score for each length"
        raise UserError("eval.tasks", f"{request.label} {what}", "leave it to eval, after training")
    return request
