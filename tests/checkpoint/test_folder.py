"""Checkpoints: what is written, whole or not at all, and what is kept."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minifoundation.checkpoint import (
    TENSORS,
    UNDONE,
    Checkpoint,
    fault,
    load_checkpoint,
    save_final,
    set_aside,
    step_folders,
    tidy,
)
from tests.checkpoint.made import full, made, same, save_step


def test_a_step_folder_gives_back_every_bit(tmp_path: Path) -> None:
    one = full()
    assert same(load_checkpoint(save_step(one, tmp_path, keep=2)), one)


def test_final_gives_back_all_but_what_only_the_run_needs(tmp_path: Path) -> None:
    one = full()
    path = save_final(one, tmp_path)
    two = load_checkpoint(path)
    assert same(two, Checkpoint(one.config, one.model, b"spm", one.progress, one.ledger, one.ema, kernels=one.kernels, scaler=one.scaler))
    plain = torch.load(path, weights_only=True)
    assert torch.equal(plain["model"]["a"], one.model["a"]), "it is a file of torch.save like any other"
    path.with_name("final.json").unlink()
    assert same(load_checkpoint(path), two), "final.pth can be carried away alone"


def test_the_tensors_are_a_file_of_safetensors(tmp_path: Path) -> None:
    one = full()
    read = load_file(save_step(one, tmp_path, keep=1) / TENSORS)
    assert read.keys() == one.tensors().keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in one.tensors().items())


def test_the_same_state_is_the_same_bytes(tmp_path: Path) -> None:
    one = full()
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        where = save_step(one, tmp_path / name, keep=1)
        files.append({path.name: path.read_bytes() for path in where.iterdir()})
    assert files[0] == files[1]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 5, 10, 200):
        save_step(made(step), tmp_path, keep=2)
    assert [folder.name for folder in step_folders(tmp_path)] == ["step_00000010", "step_00000200"]


def test_every_so_manyth_is_kept_as_well(tmp_path: Path) -> None:
    for step in range(1, 13):
        save_step(made(step), tmp_path, keep=2, keep_every=5)
    assert [int(found.name[5:]) for found in step_folders(tmp_path)] == [5, 10, 11, 12]


def test_in_a_row_of_skipped_steps_the_one_from_before_it_stays(tmp_path: Path) -> None:
    """It is what the run may go back to."""
    for step in range(1, 9):
        one = made(step)
        skipped = [{"step": number} for number in range(4, step + 1) if number < 8]
        one.progress |= {"skipped": skipped, "skipped_in_a_row": len(skipped) if step < 8 else 0}
        save_step(one, tmp_path, keep=2)
        if step == 7:
            assert [int(found.name[5:]) for found in step_folders(tmp_path)] == [3, 6, 7]
    assert [int(found.name[5:]) for found in step_folders(tmp_path)] == [7, 8]


def test_what_was_gone_back_over_goes_when_the_run_has_come_as_far_and_what_a_person_set_aside_stays(tmp_path: Path) -> None:
    for step in (4, 8, 99_999_999):
        save_step(made(step), tmp_path, keep=3)
        set_aside(tmp_path / f"step_{step:08d}", UNDONE)
    save_step(made(8), tmp_path, keep=3)
    set_aside(tmp_path / "step_00000008")
    save_step(made(7), tmp_path, keep=3)
    assert sorted(found.name.partition(".")[2] for found in tmp_path.glob("*.*")) == ["aside", "undone"]
    save_step(made(100_000_000), tmp_path, keep=3)
    assert [found.name for found in tmp_path.glob("*.*")] == ["step_00000008.aside"]


def test_an_old_one_that_cannot_be_removed_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS keeps the folder of a file that another process has opened."""
    save_step(made(1), tmp_path, keep=1)
    remove = os.rmdir

    def busy(path: Any, **where: Any) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", path)

    monkeypatch.setattr(os, "rmdir", busy)
    save_step(made(2), tmp_path, keep=1)
    assert [found.name for found in step_folders(tmp_path)] == ["step_00000002"] and (tmp_path / "step_00000001.part").exists()
    monkeypatch.setattr(os, "rmdir", remove)
    save_step(made(3), tmp_path, keep=1)
    assert [found.name for found in tmp_path.iterdir()] == ["step_00000003"]


def test_the_one_just_written_stays_though_later_ones_are_there(tmp_path: Path) -> None:
    """As after going on from an earlier step."""
    for step in (10, 20, 5):
        save_step(made(step), tmp_path, keep=1)
    assert [int(found.name[5:]) for found in step_folders(tmp_path)] == [5, 20]


def test_steps_of_nine_digits_come_after_those_of_eight(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        save_step(made(step), tmp_path, keep=1)
    assert [found.name for found in step_folders(tmp_path)] == ["step_100000000"]


def test_a_checkpoint_of_the_same_step_is_set_aside_not_overwritten(tmp_path: Path) -> None:
    first, second = made(4), made(4)
    save_step(first, tmp_path, keep=1)
    save_step(second, tmp_path, keep=1)
    assert same(load_checkpoint(tmp_path / "step_00000004"), second)
    (tmp_path / "step_00000004.aside").rename(tmp_path / "step_00000003")
    assert fault(tmp_path / "step_00000003") == "manifest.json is missing or damaged", "a renamed one is not of the step it says"
    assert set_aside(tmp_path / "step_00000003").name == "step_00000003.aside"


def test_what_a_killed_write_has_left_is_removed(tmp_path: Path) -> None:
    save_step(made(1), tmp_path, keep=1)
    save_final(made(1), tmp_path)
    (tmp_path / "step_00000002.part").mkdir()
    (tmp_path / "step_00000002.part" / TENSORS).write_bytes(b"half")
    for name in ("final.pth", "rollbacks.json"):
        (tmp_path / f"{name}.part").write_bytes(b"half")
    tidy(tmp_path)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["final.json", "final.pth", "step_00000001"]


def test_a_failed_write_leaves_the_former_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(made(1), tmp_path, keep=5)
    final = save_final(made(1), tmp_path)
    before = final.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_final(made(2), tmp_path)
    with pytest.raises(OSError, match="No space left"):
        save_step(made(2), tmp_path, keep=5)
    assert final.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final.json", "final.pth", "step_00000001"]
