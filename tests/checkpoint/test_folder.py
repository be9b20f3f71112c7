"""Checkpoints: what is written, whole or not at all, and what is kept."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minifoundation.checkpoint import (
    TENSORS,
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
