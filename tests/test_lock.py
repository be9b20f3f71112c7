"""The lock of a folder: one holder, named; given back however its process ends."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from minifoundation.errors import UserError
from minifoundation.lock import LOCK, POLL_SECONDS, held, holder


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


def test_a_full_disk_is_named_and_nothing_stays_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space") as failed, held(tmp_path / "a" / "b"):
            pass
    assert failed.value.filename == str(tmp_path / "a" / "b" / LOCK)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_made_for_nothing_is_removed_with_those_above_it(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for folder in (mine, tmp_path / "a" / "b", mine / "c" / "d"):
        with held(folder):
            assert folder.is_dir()
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", LOCK]
    with held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "made").touch()
    assert (tmp_path / "a" / "b" / "made").exists()


def test_a_lock_that_went_with_its_folder_is_nobodys(tmp_path: Path) -> None:
    """Else one that had waited for it would hold nothing."""
    folder, removed = tmp_path / "a", threading.Event()

    def waits() -> None:
        with held(folder, removed.is_set):
            (folder / "made").touch()
            with pytest.raises(UserError, match="is being written by another process"), held(folder):
                pass

    with ThreadPoolExecutor(1) as pool:
        with held(folder):
            waiting = pool.submit(waits)
            time.sleep(2 * POLL_SECONDS)
        waiting.result(30)
    assert (folder / "made").exists()


def test_a_file_system_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)
    with (
        pytest.raises(UserError, match=r"cannot be locked \(function not implemented\); give a folder on a file system that has"),
        held(tmp_path),
    ):
        pass
