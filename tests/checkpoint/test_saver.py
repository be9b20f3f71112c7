"""Saving beside the training: what is written is the state at the save, one at a time, and no error is lost."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from minifoundation.checkpoint import Saver, load_checkpoint, saver, step_folders, write_step
from minifoundation.errors import UserError
from tests.checkpoint.made import full, made, same


def made_saver(folder: Path, said: list[str], if_fails: Literal["stop", "continue"] = "stop", *, background: bool = True) -> Saver:
    return Saver(folder, keep=2, keep_every=None, background=background, if_fails=if_fails, say=said.append)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writing waits for this."""
    opened = threading.Event()
    real = write_step

    def waiting(*arguments: Any) -> Path:
        assert opened.wait(30)
        return real(*arguments)

    monkeypatch.setattr(saver, "write_step", waiting)
    yield opened
    opened.set()


@pytest.mark.parametrize("background", [True, False])
def test_what_is_written_is_the_state_at_the_save(tmp_path: Path, background: bool) -> None:
    saves = made_saver(tmp_path, [], background=background)
    for step in (1, 2):  # the second goes through the memory of the first
        one = full(step)
        saves.save(one)
        saves.finish()
        assert same(load_checkpoint(tmp_path / f"step_{step:08d}"), one)
    saves.close()


def test_training_goes_on_while_it_is_written(tmp_path: Path, gate: threading.Event) -> None:
    saves, one = made_saver(tmp_path, []), made(1)
    before = one.model["a"].clone()
    saves.save(one)
    saves.hold()
    one.model["a"].zero_()
    saves.check()
    assert step_folders(tmp_path) == []
    gate.set()
    saves.finish()
    assert torch.equal(load_checkpoint(tmp_path / "step_00000001").model["a"], before)
    saves.close()


def test_a_second_save_waits_for_the_first_and_says_so(tmp_path: Path, gate: threading.Event) -> None:
    said: list[str] = []
    saves = made_saver(tmp_path, said)
    saves.save(made(1))
    threading.Timer(0.2, gate.set).start()
    saves.save(made(2))
    assert [folder.name for folder in step_folders(tmp_path)][:1] == ["step_00000001"]
    assert len(said) == 1 and said[0].startswith("step 2: waited 0.")
    saves.finish()
    assert len(step_folders(tmp_path)) == 2
    saves.close()


def test_the_same_step_is_written_once(tmp_path: Path) -> None:
    saves = made_saver(tmp_path, [])
    saves.save(made(1))
    saves.save(made(1))
    saves.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    saves.close()


def test_a_save_that_fails_beside_what_ends_the_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    failing_write(monkeypatch, tmp_path)

    def run() -> None:
        with made_saver(tmp_path, said) as saves:
            saves.save(made(1))
            raise UserError("another", "fault", "remedy")

    with pytest.raises(UserError, match="another"):
        run()
    assert said == ["warning: not written: outputs/x: no space left on device"]


def full_disk(monkeypatch: pytest.MonkeyPatch, _folder: Path) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))


def failing_write(monkeypatch: pytest.MonkeyPatch, _folder: Path) -> None:
    def fails(*_arguments: Any) -> Path:
        raise OSError(28, "No space left on device", "outputs/x")

    monkeypatch.setattr(saver, "write_step", fails)


def folder_gone(_monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (full_disk, r"a checkpoint takes 1\.0 MiB, and 0\.0 MiB are free on its disk; free some space and continue with --resume auto"),
        (failing_write, r"No space left on device|outputs/x: no space left on device"),
        (folder_gone, r"the folder of the run is gone"),
    ],
)
@pytest.mark.parametrize("if_fails", ["stop", "continue"])
def test_a_save_that_fails_stops_the_run_at_the_next_look_or_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fail: Callable[[pytest.MonkeyPatch, Path], None],
    message: str,
    if_fails: Literal["stop", "continue"],
) -> None:
    folder, said = tmp_path / "run", list[str]()
    folder.mkdir()
    saves = made_saver(folder, said, if_fails)
    saves.save(made(1))
    saves.finish()

    def two_steps() -> None:
        saves.save(made(2))
        while saves._writing is not None:
            saves.check()

    with monkeypatch.context() as patch:
        fail(patch, folder)
        if if_fails == "stop":
            with pytest.raises((UserError, OSError), match=message):
                two_steps()
            assert said == []
        else:
            two_steps()
            (line,) = said
            assert line.startswith("warning: not written: ") and line.endswith("training on, since train.if_save_fails is continue")
    if fail is not folder_gone:
        assert [path.name for path in folder.iterdir()] == ["step_00000001"]
        saves.save(made(2))  # there is room again
        saves.finish()
        assert load_checkpoint(folder / "step_00000002").progress["step"] == 2
    saves.close()


def test_an_error_of_ours_is_never_only_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: Any) -> Path:
        raise KeyError("a fault of the program")

    monkeypatch.setattr(saver, "write_step", broken)
    saves = made_saver(tmp_path, [], "continue")
    saves.save(made(1))
    with pytest.raises(KeyError):
        saves.finish()


def test_without_the_memory_for_a_copy_training_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saver, "free_memory_bytes", lambda: 100)
    said: list[str] = []
    saves, one = made_saver(tmp_path, said), made(1)
    saves.save(one)
    assert same(load_checkpoint(tmp_path / "step_00000001"), one), "there when save returns"
    saves.save(made(2))
    assert len(said) == 1 and said[0].startswith("warning: train.async_save: too little host memory")


@pytest.mark.parametrize("moment", range(6))
def test_a_folder_that_goes_while_it_is_written_to_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    out_dir, real, seen = tmp_path / "run", os.fsync, list[int]()
    out_dir.mkdir()

    def moved(descriptor: int) -> None:
        if len(seen) == moment:
            out_dir.rename(tmp_path / "elsewhere")
        seen.append(descriptor)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", moved)
    saves = made_saver(out_dir, [])
    saves.save(full(1))
    with pytest.raises(UserError, match="the folder of the run is gone; find out where it went"):
        saves.save(full(2))
    saves.close()
    assert len(seen) > moment and not out_dir.exists()
