"""The latest good checkpoint, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from minifoundation.checkpoint import (
    MANIFEST,
    STATE,
    TENSORS,
    fault,
    folder,
    latest_good,
    load_checkpoint,
    save_final,
    set_aside,
)
from minifoundation.errors import UserError
from tests.checkpoint.made import full, made, same, save_step


def silent(_line: str) -> None:
    pass


def test_one_that_was_set_aside_or_copied_is_whole_and_one_under_the_name_of_another_step_is_not(tmp_path: Path) -> None:
    saved = save_step(full(3), tmp_path, keep=1)
    aside, copy, other = set_aside(shutil.copytree(saved, tmp_path / "step_00000004")), tmp_path / "best", tmp_path / "step_00000005"
    for place in (copy, other):
        shutil.copytree(saved, place)
    assert fault(aside) is None and fault(copy) is None
    assert same(load_checkpoint(aside), load_checkpoint(saved)) and same(load_checkpoint(copy), load_checkpoint(saved))
    assert fault(other) == "manifest.json is missing or damaged"


def test_no_older_one_is_taken_for_one_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (3, 4):
        save_step(full(step), tmp_path, keep=2)
    read = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path == tmp_path / "step_00000004" / "manifest.json":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(UserError, match=r"step_00000004/manifest\.json: cannot be read \(Permission denied\); mend that"):
        latest_good(tmp_path, silent)


@pytest.mark.parametrize("damage", ["cut", "flip", "no manifest", "no state"])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path, damage: str) -> None:
    good, bad = save_step(made(1), tmp_path, keep=5), save_step(made(2), tmp_path, keep=5)
    state = bad / TENSORS
    match damage:
        case "cut":
            state.write_bytes(state.read_bytes()[:-10])
        case "flip":
            content = bytearray(state.read_bytes())
            content[len(content) // 2] ^= 1
            state.write_bytes(content)
        case "no manifest":
            (bad / MANIFEST).unlink()
        case "no state":
            (bad / STATE).unlink()
    said: list[str] = []
    assert latest_good(tmp_path, said.append) == good
    assert len(said) == 1 and "step_00000002: " in said[0] and said[0].endswith("; passed over")
    with pytest.raises(UserError, match=r"step_00000002: not a checkpoint"):
        load_checkpoint(bad)


@pytest.mark.parametrize("name", [TENSORS, STATE, MANIFEST, "tokenizer.model"])
def test_every_cut_and_every_changed_byte_is_seen(tmp_path: Path, name: str) -> None:
    good, bad = save_step(full(1), tmp_path, keep=5), save_step(full(2), tmp_path, keep=5)
    path = bad / name
    whole = path.read_bytes()
    drawn = random.Random(0)
    places = drawn.sample(range(len(whole)), min(50, len(whole)))
    damaged = [whole[:place] for place in places] + [whole + b"\n"]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= drawn.randrange(1, 256)
        damaged.append(bytes(changed))
    for content in damaged:
        path.write_bytes(content)
        assert latest_good(tmp_path, silent) == good
        with pytest.raises(UserError, match=r"step_00000002: not a checkpoint"):
            load_checkpoint(bad)
    path.write_bytes(whole)
    assert latest_good(tmp_path, silent) == bad


@pytest.mark.parametrize("beside", [True, False], ids=["final.json beside it", "alone"])
def test_a_damaged_final_is_refused(tmp_path: Path, beside: bool) -> None:
    """Alone it has the checks of its archive, which cover every tensor and the structure."""
    path = save_final(full(), tmp_path)
    if not beside:
        path.with_name("final.json").unlink()
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = [(info.header_offset, info.file_size) for info in archive.infolist()]
    drawn = random.Random(1)
    end = max(offset for offset, _ in records)
    for place in range(0, end if beside else 0, end // 40):
        changed = bytearray(whole)
        changed[place] ^= drawn.randrange(1, 256)
        path.write_bytes(changed)
        with pytest.raises(UserError, match=r"final\.pth: not a checkpoint"):
            load_checkpoint(path)
    tensor = whole.index(full().tokenizer_model)
    changed = bytearray(whole)
    changed[tensor] ^= 1
    for content in (bytes(changed), whole[:-1], whole[: len(whole) // 2], b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"final\.pth: not a checkpoint"):
            load_checkpoint(path)


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
    [(5, "format 5 is newer than 4; update the toolkit"), (3, "format 3 is older than 4; read it with the version that wrote it")],
)
def test_another_format_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int, message: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(folder, "FORMAT", written)
        final, step = save_final(made(), tmp_path), save_step(made(), tmp_path, keep=1)
    for path in (final, step):
        with pytest.raises(UserError, match=message):
            load_checkpoint(path)
    with pytest.raises(UserError, match=message):
        latest_good(tmp_path, silent)
    final.with_name("final.json").unlink()
    with pytest.raises(UserError, match=message):
        load_checkpoint(final)


def test_a_step_of_format_2_is_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    old = tmp_path / "step_00000005"
    old.mkdir()
    (old / MANIFEST).write_text(json.dumps({"format": 2, "step": 5, "bytes": 3, "sha256": "0" * 64}))
    with pytest.raises(UserError, match="step_00000005: format 2 is older than 4"):
        latest_good(tmp_path, silent)
