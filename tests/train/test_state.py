"""What a run is made of, by itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from minifoundation.checkpoint import Saver, step_folders
from minifoundation.distributed import Split, World
from minifoundation.errors import UserError
from minifoundation.train.state import Training
from tests.checkpoint.made import made
from tests.train.threads import threads


def test_a_save_that_the_processes_have_agreed_on_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever becomes of the disk meanwhile: those that give their parts wait for the first one."""
    saver = Saver(tmp_path, keep=2, keep_every=None, background=False, if_fails="continue", say=print)
    answers = iter([True, False])
    monkeypatch.setattr(saver, "accepts", lambda _checkpoint: next(answers))
    training: Any = SimpleNamespace(world=World(), saver=saver, checkpoint=lambda with_optimizer: made(3))
    Training.save(cast(Training, training))
    assert [folder.name for folder in step_folders(tmp_path)] == ["step_00000003"]


def saved(write: Callable[[Any], None], split: Split) -> list[tuple[float, str | None]]:
    """Return when each of two processes has come out of a save that the first one does by ``write``, and what was raised there."""
    saver = SimpleNamespace(accepts=lambda _checkpoint: True, write=write)

    def one(world: World) -> tuple[float, str | None]:
        training: Any = SimpleNamespace(
            world=world, saver=saver, plan=SimpleNamespace(split=split), checkpoint=lambda with_optimizer: made(3)
        )
        try:
            Training.save(cast(Training, training))
        except UserError as error:
            return time.monotonic(), str(error)
        return time.monotonic(), None

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, threads(2)))


@pytest.mark.parametrize("split", [Split("ddp"), Split("fsdp", 2)])
def test_all_wait_for_a_write_in_the_foreground(split: Split) -> None:
    """In a step they would wait for the first one as for a process that stands still, and stop the run before anything is saved."""
    written: list[float] = []

    def slowly(_checkpoint: Any) -> None:
        time.sleep(0.5)
        written.append(time.monotonic())

    assert all(left >= written[0] for left, _ in saved(slowly, split))


def test_a_save_that_fails_in_the_foreground_is_raised_on_all() -> None:
    def fails(_checkpoint: Any) -> None:
        raise UserError("out_dir", "is gone", "look for it")

    assert [error for _, error in saved(fails, Split("ddp"))] == ["out_dir: is gone; look for it"] * 2
