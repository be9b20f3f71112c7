"""Checkpoints: written whole or not at all, read without running code, the latest good one found by its hash.

``step_00001000/`` is a folder to resume from: ``state.pth`` and a manifest with its hash, written last. ``final.pth`` is one
portable file without the optimizer. Both hold plain containers and tensors under one schema.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minifoundation import config
from minifoundation.config import RunConfig
from minifoundation.errors import UserError

FORMAT = 2
STATE = "state.pth"
MANIFEST = "manifest.json"
FINAL = "final.pth"


@dataclass
class Checkpoint:
    """A run at one step."""

    config: RunConfig
    model: dict[str, Tensor]
    """fp32 weights by the names of ``Transformer.state_dict()``."""
    tokenizer_model: bytes
    """The SentencePiece model file the run was trained with."""
    progress: dict[str, Any]
    """Step, tokens, place in the data: the fields of ``train.state.Progress``."""
    ledger: list[dict[str, Any]] = field(default_factory=list)
    """What was read of each source, phase after phase: the fields of ``data.ledger.Entry``."""
    ema: dict[str, Tensor] | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    """State of the optimizer and the loss scaler; empty in ``final.pth``."""
    kernels: dict[str, str] = field(default_factory=dict)
    """The kernels that were chosen by measurement, by what they compute: a resumed run repeats them."""


def save_step(checkpoint: Checkpoint, out_dir: Path, *, keep: int) -> Path:
    """Write ``step_<n>/`` whole or not at all, remove all but the newest ``keep`` and return the folder."""
    folder = out_dir / f"step_{checkpoint.progress['step']:08d}"
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        _write(checkpoint, part / STATE)
        manifest = {
            "format": FORMAT,
            "step": checkpoint.progress["step"],
            "bytes": (part / STATE).stat().st_size,
            "sha256": _sha256(part / STATE),
        }
        write_whole(part / MANIFEST, json.dumps(manifest, indent=1).encode())
        if folder.exists():
            shutil.rmtree(folder)
        _put(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    for old in step_folders(out_dir)[:-keep]:
        shutil.rmtree(old)
    return folder


def save_final(checkpoint: Checkpoint, out_dir: Path) -> Path:
    """Write the portable ``final.pth`` (no optimizer) whole or not at all and return its path."""
    path = out_dir / FINAL
    part = path.with_suffix(".part")
    try:
        _write(checkpoint, part)
        _put(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path


def _write(checkpoint: Checkpoint, path: Path) -> None:
    payload = {
        "format": FORMAT,
        "config": checkpoint.config.model_dump(mode="json"),
        "model": checkpoint.model,
        "tokenizer_model": checkpoint.tokenizer_model,
        "progress": checkpoint.progress,
        "ledger": checkpoint.ledger,
        "ema": checkpoint.ema,
        "optimizer": checkpoint.optimizer,
        "kernels": checkpoint.kernels,
    }
    with path.open("wb") as out:
        try:
            torch.save(payload, out)
        except RuntimeError as error:  # torch hides ENOSPC of the file behind its own zip writer's error
            free = shutil.disk_usage(path.parent).free
            if free < 64 * 2**20:
                raise OSError(28, "No space left on device", str(path)) from error
            raise
        out.flush()
        os.fsync(out.fileno())


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file whole or not at all, in a folder that is made when it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        _put(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _put(part: Path, place: Path) -> None:
    """Rename ``part`` to ``place`` and make the new name durable too: what it replaces may be removed after this."""
    part.replace(place)
    folder = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_folders(out_dir: Path) -> list[Path]:
    """Return the step checkpoints of a run, oldest first."""
    return sorted(folder for folder in out_dir.glob("step_*") if folder.is_dir() and folder.name[5:].isdigit())


def fault(folder: Path) -> str | None:
    """Return what is wrong with a step checkpoint, or None when its hash is right."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{MANIFEST} is missing or unreadable"
    state = folder / STATE
    if not state.is_file():
        return f"{STATE} is missing"
    if state.stat().st_size != manifest.get("bytes"):
        return f"{STATE} has {state.stat().st_size} bytes instead of {manifest.get('bytes')}"
    return None if _sha256(state) == manifest.get("sha256") else f"{STATE} does not match its sha256"


def latest_good(out_dir: Path) -> Path | None:
    """Return the newest step checkpoint whose hash is right; each bad one that is passed over is named in a warning."""
    for folder in reversed(step_folders(out_dir)):
        problem = fault(folder)
        if problem is None:
            return folder
        warnings.warn(f"{folder}: {problem}; passed over", stacklevel=2)
    return None


def load_checkpoint(path: Path, *, device: torch.device | str = "cpu") -> Checkpoint:
    """Return the checkpoint in ``final.pth`` or a step folder, tensors on ``device``.

    Raises:
        UserError: nothing there, damaged, not a checkpoint of this toolkit, or of another format.
    """
    remedy = "give final.pth or a step_ folder of a run"
    if path.is_dir():
        problem = fault(path)
        if problem is not None:
            inside = [p for p in (path / FINAL, latest_good(path)) if p is not None and p.exists()]
            raise UserError(str(path), f"not a checkpoint ({problem})", f"did you mean {inside[0]}?" if inside else remedy)
        path = path / STATE
    if not path.is_file():
        raise UserError(str(path), "no such checkpoint", remedy)
    try:
        payload = torch.load(path, map_location=device, weights_only=True, mmap=str(device) == "cpu")
    except Exception as error:  # a foreign or cut file fails in a dozen ways, all of which mean the same here
        raise UserError(str(path), f"not a checkpoint ({type(error).__name__})", remedy) from None
    if not isinstance(payload, dict) or not {"format", "config", "model", "progress"} <= payload.keys():
        raise UserError(str(path), "not a checkpoint of this toolkit", remedy)
    if payload["format"] > FORMAT:
        raise UserError(str(path), f"format {payload['format']} is newer than {FORMAT}", "update the toolkit")
    if payload["format"] < FORMAT:
        raise UserError(str(path), f"format {payload['format']} is older than {FORMAT}", "read it with the version that wrote it")
    return Checkpoint(
        config=config.build(RunConfig, payload["config"], str(path)),
        model=payload["model"],
        tokenizer_model=payload["tokenizer_model"],
        progress=payload["progress"],
        ledger=payload["ledger"],
        ema=payload["ema"],
        optimizer=payload["optimizer"],
        kernels=payload.get("kernels", {}),
    )
