"""The lock of a folder: one holder, named; given back however its process ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from minifoundation.errors import UserError
from minifoundation.lock import LOCK, held, holder


def hold(folder: Path, holds: Event) -> None:
    with held(folder):
        holds.set()
        signal.pause()


def test_a_killed_holder_is_of_no_account(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    holds = spawn.Event()
    process = spawn.Process(target=hold, args=(tmp_path, holds))
    process.start()
    assert holds.wait(60)
    assert (owner := holder(tmp_path)) is not None and owner.startswith(f"pid {process.pid} on ")
    with (
        pytest.raises(UserError, match=rf"is being written by another process \(pid {process.pid} on .*\); wait until it is done"),
        held(tmp_path),
    ):
        pass
    process.kill()
    process.join()
    assert (tmp_path / LOCK).exists() and holder(tmp_path) is None
    with held(tmp_path):
        assert (owner := holder(tmp_path)) is not None and owner.startswith(f"pid {os.getpid()} on ")
    assert holder(tmp_path) is None


def test_nobody_holds_a_folder_without_a_lock(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
