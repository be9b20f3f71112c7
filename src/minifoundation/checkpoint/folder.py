"""What a checkpoint is, and how it is written: whole or not at all.

``step_00001000/`` is a folder to resume from, and ``final.pth`` one portable file without the optimizer (docs/checkpoints.md).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from minifoundation.checkpoint.files import HashedFile, Record, put, sync_folder, write_whole
from minifoundation.checkpoint.tensors import Layout
from minifoundation.config import RunConfig
from minifoundation.distributed import whole

FORMAT = 4
TENSORS = "tensors.safetensors"
STATE = "state.json"
TOKENIZER = "tokenizer.model"
MANIFEST = "manifest.json"
FINAL = "final.pth"
FINAL_MANIFEST = "final.json"
PART = ".part"
ASIDE = ".aside"
"""Ends the name of a checkpoint that its run does not go on from any more, since a person has chosen another; it stays."""
UNDONE = ".undone"
"""Ends the name of one that its run has gone back over by itself; it goes once the run has come as far again."""

SECTIONS = ("model", "ema", "optimizer", "window", "kernel_state")
"""The fields of a checkpoint that hold tensors; a tensor's name in the file is section/name."""


@dataclass
class Checkpoint:
    """A run at one step."""

    config: RunConfig
    model: dict[str, Tensor]
    """fp32 weights by the names of ``Transformer.state_dict()``."""
    tokenizer_model: bytes
    """The file of the tokenizer the run was trained with: a SentencePiece model, or what ``data.fast_tokenizer.packed`` made."""
    progress: dict[str, Any]
    """Step, tokens, place in the data: the fields of ``train.state.Progress``."""
    ledger: list[dict[str, Any]] = field(default_factory=list)
    """What was read of each source, phase after phase: the fields of ``data.ledger.Entry``."""
    ema: dict[str, Tensor] | None = None
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    """State of the optimizer by what it is and whose; empty in ``final.pth``, as the rest below."""
    scaler: dict[str, float] = field(default_factory=dict)
    """State of the loss scaler of fp16."""
    window: dict[str, Tensor] = field(default_factory=dict)
    """What spikes are told by: the losses and gradient norms of the last steps."""
    kernel_state: dict[str, Tensor] = field(default_factory=dict)
    """What kernels carry from step to step beside the weights, such as the scales of 8-bit formats."""
    kernels: dict[str, str] = field(default_factory=dict)
    """Which kernels computed, where several can."""

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by section/name."""
        return {f"{section}/{name}": tensor for section in SECTIONS for name, tensor in (getattr(self, section) or {}).items()}

    @cached_property
    def layout(self) -> Layout:
        """Of ``tensors``, which are the same ones for as long as there is this checkpoint."""
        return Layout.of(self.tensors())

    def gathered(self) -> Iterator[tuple[str, Tensor]]:
        """Give name and whole of every tensor, in the order in which they are written; every process has to go through all of them."""
        tensors = self.tensors()
        for entry in self.layout.fields:
            yield entry.name, whole(tensors[entry.name])

    def in_host_memory(self, *, kept: bool) -> Checkpoint:
        """Return it with every tensor whole and in host memory, where it is ``kept``; every process has to call this."""
        found = {name: tensor.cpu() for name, tensor in self.gathered() if kept}
        if not kept:
            return self
        made = replace(self)
        for section in SECTIONS:
            tensors = getattr(self, section)
            if tensors is not None:
                setattr(made, section, {name: found[f"{section}/{name}"] for name in tensors})
        return made

    def let_go(self) -> None:
        """Drop the tensors, once they have been copied to where they are used.

        Those of a step folder lie in its file, which else keeps its place on the disk for as long as the run goes on, removed or not.
        """
        for section in SECTIONS:
            setattr(self, section, None if section == "ema" else {})

    def state(self) -> dict[str, Any]:
        """Return all but the tensors and the tokenizer, as JSON has it."""
        return {
            "format": FORMAT,
            "config": self.config.model_dump(mode="json"),
            "progress": self.progress,
            "ledger": self.ledger,
            "scaler": self.scaler,
            "kernels": self.kernels,
            "has_ema": self.ema is not None,
        }


def step_folder(out_dir: Path, step: int) -> Path:
    """Return where the checkpoint of a step belongs."""
    return out_dir / f"step_{step:08d}"


def step_folders(out_dir: Path) -> list[Path]:
    """Return the step checkpoints of a run, oldest first."""
    return sorted((folder for folder in out_dir.glob("step_*") if folder.is_dir() and folder.name[5:].isdigit()), key=step_of)


def first_of_a_row(progress: Mapping[str, Any]) -> int | None:
    """Return the first of the skipped steps in a row at whose end a checkpoint's ``progress`` stands; None where its last step was good."""
    count = progress.get("skipped_in_a_row", 0)
    return progress["skipped"][-count]["step"] if count else None


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    return int(folder.name[5:])


def write_step(state: Mapping[str, Any], layout: Layout, body: Iterable[memoryview], tokenizer_model: bytes, out_dir: Path) -> Path:
    """Write ``step_<n>/`` whole or not at all and return it; another checkpoint of that step is set aside.

    Args:
        state: ``Checkpoint.state()``.
        body: the bytes of the tensors, in the order of ``layout``.
    """
    step = state["progress"]["step"]
    folder = step_folder(out_dir, step)
    part = folder.with_name(folder.name + PART)
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir()
        files = {
            TENSORS: _written(part / TENSORS, [layout.header()], body),
            STATE: _written(part / STATE, [json.dumps(state, indent=1).encode()]),
            TOKENIZER: _written(part / TOKENIZER, [tokenizer_model]),
        }
        write_whole(part / MANIFEST, sealed(step, files))
        if folder.exists():
            set_aside(folder)
        put(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return folder


def _written(path: Path, head: Iterable[bytes], body: Iterable[memoryview] = ()) -> Record:
    with HashedFile(path) as out:
        for block in head:
            out.write(block)
        for view in body:
            out.write(view)
    assert out.record is not None
    return out.record


def prune(newest: Path, *, keep: int, keep_every: int | None, before: int | None = None) -> None:
    """Remove the checkpoints before ``newest``, which has just been written, but for the last ``keep`` and every ``keep_every``-th step.

    What the run had gone back over goes too. What cannot be removed, as where another process reads it over NFS, is tried again next time.

    Args:
        before: the last one of an earlier step than this stays as well: the run may have to go back to it.
    """
    saved = [folder for folder in step_folders(newest.parent) if step_of(folder) <= step_of(newest)]
    spared = [folder for folder in saved if before is not None and step_of(folder) < before][-1:]
    gone = [folder for folder in saved[:-keep] if folder not in spared and (keep_every is None or step_of(folder) % keep_every)]
    undone = re.compile(rf"step_(\d+){re.escape(UNDONE)}\d*")
    gone += [folder for folder in newest.parent.iterdir() if (named := undone.fullmatch(folder.name)) and int(named[1]) <= step_of(newest)]
    for folder in gone:
        set_aside(folder, PART)  # first of all it is no checkpoint any more, so that half of one is never taken for a damaged one
    _remove_parts(newest.parent)


def set_aside(folder: Path, end: str = ASIDE) -> Path:
    """Rename a checkpoint, by an ``end`` to its name, so that no run goes on from it, and return its new place."""
    number = 1
    while (place := folder.with_name(f"{folder.name}{end}{'' if number == 1 else number}")).exists():
        number += 1
    folder.rename(place)
    sync_folder(folder.parent)
    return place


def tidy(out_dir: Path) -> None:
    """Remove what a write that was killed has left; for the one run that holds the folder."""
    _remove_parts(out_dir)
    for part in (out_dir / (name + PART) for name in (FINAL, FINAL_MANIFEST, "metrics.csv", "config.yaml", "run.json", "rollbacks.json")):
        part.unlink(missing_ok=True)


def _remove_parts(out_dir: Path) -> None:
    for part in out_dir.glob(f"step_*{PART}*"):
        shutil.rmtree(part, ignore_errors=True)


def save_final(checkpoint: Checkpoint, out_dir: Path) -> Path:
    """Write the portable ``final.pth`` (no optimizer), and ``final.json`` with its hash, whole or not at all; return its path."""
    path, manifest = out_dir / FINAL, out_dir / FINAL_MANIFEST
    part = path.with_name(path.name + PART)
    payload = {
        **checkpoint.state(),
        "model": {name: tensor.detach().cpu() for name, tensor in checkpoint.model.items()},
        "tokenizer_model": checkpoint.tokenizer_model,
        "ema": checkpoint.ema and {name: tensor.detach().cpu() for name, tensor in checkpoint.ema.items()},
    }
    try:
        with HashedFile(part) as out:
            try:
                torch.save(payload, cast(IO[bytes], out))
            except RuntimeError as error:  # torch's zip writer hides what the file said behind an error of its own
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
        assert out.record is not None
        manifest.unlink(missing_ok=True)  # the hash of the former file does not outlive it
        put(part, path)
        write_whole(manifest, sealed(checkpoint.progress["step"], {FINAL: out.record}))
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path


def sealed(step: int, files: Mapping[str, Record]) -> bytes:
    """Return the text of a manifest, which carries a hash of itself: no byte of a checkpoint is without one."""
    return with_seal({"format": FORMAT, "step": step, "files": {name: asdict(record) for name, record in files.items()}})


def with_seal(manifest: dict[str, Any]) -> bytes:
    """Return a manifest as its file has it: with a hash of all the rest of it."""
    seal = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return json.dumps({**manifest, "seal": seal}, indent=1).encode()
