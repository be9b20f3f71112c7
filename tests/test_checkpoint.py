"""Checkpoints: whole or not at all, the latest good one, and what is refused."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from minifoundation import checkpoint as checkpoints
from minifoundation.checkpoint import Checkpoint, latest_good, load_checkpoint, save_final, save_step, step_folders
from minifoundation.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from minifoundation.errors import UserError


def made(step: int = 3, **changes: Any) -> Checkpoint:
    config = RunConfig(
        model=ModelConfig(d_model=16, n_layer=1, n_head=2, n_kv_head=1, d_ff=24, original_seq_len=4096),
        data=DataConfig(source="x"),
        train=TrainConfig(tokens=10),
    )
    weights = {"a": torch.randn(4, 3), "b": torch.arange(3.0)}
    return Checkpoint(config, weights, b"spm", {"step": step, "sample": 7}, **changes)


def test_step_and_final_give_back_what_was_saved(tmp_path: Path) -> None:
    one = made(
        ema={"a": torch.ones(2)},
        ledger=[{"source": "x"}],
        optimizer={"adamw": {"state": {0: {"m": torch.ones(1)}}}, "scaler": {}},
        kernels={"attention": "cudnn"},
    )
    for path in (save_step(one, tmp_path, keep=2), save_final(one, tmp_path)):
        two = load_checkpoint(path)
        assert two.config == one.config and two.progress == one.progress and two.ledger == one.ledger and two.tokenizer_model == b"spm"
        assert all(torch.equal(two.model[name], one.model[name]) for name in one.model)
        assert two.ema is not None and torch.equal(two.ema["a"], torch.ones(2))
        assert torch.equal(two.optimizer["adamw"]["state"][0]["m"], torch.ones(1)) and two.kernels == one.kernels


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 5, 10, 200):
        save_step(made(step), tmp_path, keep=2)
    assert [folder.name for folder in step_folders(tmp_path)] == ["step_00000010", "step_00000200"]


@pytest.mark.parametrize("damage", ["cut", "flip", "no manifest", "no state"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, damage: str) -> None:
    good, bad = save_step(made(1), tmp_path, keep=5), save_step(made(2), tmp_path, keep=5)
    state = bad / "state.pth"
    match damage:
        case "cut":
            state.write_bytes(state.read_bytes()[:-10])
        case "flip":
            content = bytearray(state.read_bytes())
            content[len(content) // 2] ^= 1
            state.write_bytes(content)
        case "no manifest":
            (bad / "manifest.json").unlink()
        case "no state":
            state.unlink()
    with pytest.warns(UserWarning, match="step_00000002.*passed over"):
        assert latest_good(tmp_path) == good
    with pytest.raises(UserError, match=r"step_00000002: not a checkpoint"):
        load_checkpoint(bad)


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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["final.pth", "step_00000001"]


def test_what_is_not_a_checkpoint_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"weights": torch.ones(1)}, tmp_path / "foreign.pth")
    torch.save(torch.ones(1), tmp_path / "tensor.pth")
    save_final(made(), tmp_path)
    for name, message in {
        "missing.pth": "no such checkpoint",
        "text.pth": "not a checkpoint",
        "foreign.pth": "not a checkpoint of this toolkit",
        "tensor.pth": "not a checkpoint of this toolkit",
        ".": "did you mean .*final.pth",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            load_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_no_code_is_run_on_loading(tmp_path: Path) -> None:
    flag = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(flag),)

    path = tmp_path / "evil.pth"
    torch.save({"x": 1}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, pickle.dumps(Evil(), 2) if name.endswith("data.pkl") else content)
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(path)
    assert not flag.exists()


@pytest.mark.parametrize(
    ("written", "message"),
    [(3, "format 3 is newer than 2; update the toolkit"), (1, "format 1 is older than 2; read it with the version that wrote it")],
)
def test_another_format_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int, message: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "FORMAT", written)
        path = save_final(made(), tmp_path)
    with pytest.raises(UserError, match=message):
        load_checkpoint(path)
