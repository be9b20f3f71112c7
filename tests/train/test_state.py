"""What a run is made of, by itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from minifoundation.checkpoint import Saver, step_folders
from minifoundation.distributed import World
from minifoundation.train.state import Training
from tests.checkpoint.made import made


def test_a_save_that_the_processes_have_agreed_on_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever becomes of the disk meanwhile: those that give their parts wait for the first one."""
    saver = Saver(tmp_path, keep=2, keep_every=None, background=False, if_fails="continue", say=print)
    answers = iter([True, False])
    monkeypatch.setattr(saver, "accepts", lambda _checkpoint: next(answers))
    training: Any = SimpleNamespace(world=World(), saver=saver, checkpoint=lambda with_optimizer: made(3))
    Training.save(cast(Training, training))
    assert [folder.name for folder in step_folders(tmp_path)] == ["step_00000003"]
