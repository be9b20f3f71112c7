"""Checkpoints read without running code, and the newest good one found by its hashes."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minifoundation import config
from minifoundation.checkpoint.files import Record, record_of
from minifoundation.checkpoint.folder import (
    FINAL,
    FINAL_MANIFEST,
    FORMAT,
    MANIFEST,
    SECTIONS,
    STATE,
    TENSORS,
    TOKENIZER,
    Checkpoint,
    step_folders,
    step_of,
    with_seal,
)
from minifoundation.config import RunConfig
from minifoundation.errors import UserError
from minifoundation.wording import counted

REMEDY = "give final.pth or a step_ folder of a run"


def _files(path: Path, place: Path) -> dict[str, Record]:
    """Return what the manifest in ``path`` says of the files of the checkpoint ``place``.

    Raises:
        ValueError, KeyError, TypeError: it is damaged.
        UserError: it is of another format.
    """
    text = path.read_bytes()
    manifest = json.loads(text)
    if manifest.keys() == {"format", "step", "bytes", "sha256"}:
        check_format(2, place)
    seal = manifest.pop("seal")
    named = place.name.removeprefix("step_") if place.is_dir() else ""  # one that was set aside or copied has a name of its own
    if with_seal(manifest) != text or (named.isdigit() and int(named) != manifest["step"]):
        raise ValueError(seal)
    check_format(manifest["format"], place)
    return {name: Record.of(entry) for name, entry in manifest["files"].items()}


def fault(path: Path) -> str | None:
    """Return what is wrong with a step folder or a ``final.pth``, every byte of which is read; None when nothing is.

    A ``final.pth`` without the ``final.json`` beside it has only the checksums of its own archive, which torch does not look at.

    Raises:
        UserError: it is of another format, or may not be read.
    """
    manifest = path / MANIFEST if path.is_dir() else path.with_name(FINAL_MANIFEST)
    if not path.is_dir() and not (path.name == FINAL and manifest.exists()):
        return _archive_fault(path) if path.is_file() else "is missing"
    try:
        files = _files(manifest, path)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return f"{manifest.name} is missing or damaged"
    except OSError as error:  # it may be whole: an older one is not to be taken for it
        raise UserError(str(manifest), f"cannot be read ({error.strerror})", "mend that, and run the same command again") from None
    folder = path if path.is_dir() else path.parent
    return next((found for name, record in files.items() if (found := _difference(folder / name, record)) is not None), None)


def _archive_fault(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile meets damage with errors of many kinds
        return f"{type(error).__name__}: no whole file of torch.save"
    return None if damaged is None else f"{damaged} in it does not match its checksum"


def _difference(path: Path, record: Record) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != record.bytes:
        return f"{path.name} has {counted(path.stat().st_size, 'byte')} instead of {record.bytes:,}"
    return None if record_of(path) == record else f"{path.name} does not match its sha256"


def latest_good(out_dir: Path, say: Callable[[str], None], *, before: int | None = None) -> Path | None:
    """Return the newest step checkpoint that is whole; each that is not and is passed over is named through ``say``.

    Args:
        before: only those of earlier steps than this.

    Raises:
        UserError: the newest whole one is of another format.
    """
    for folder in reversed(step_folders(out_dir)):
        if before is not None and step_of(folder) >= before:
            continue
        problem = fault(folder)
        if problem is None:
            return folder
        say(f"warning: {folder}: {problem}; passed over")
    return None


def load_checkpoint(path: Path, *, verified: bool = False) -> Checkpoint:
    """Return the checkpoint in ``final.pth`` or a step folder, tensors in host memory.

    Args:
        verified: its hashes have just been compared, and are not once more.

    Raises:
        UserError: nothing there, damaged, not a checkpoint of this toolkit, or of another format.
    """
    if not path.exists():
        raise UserError(str(path), "no such checkpoint", REMEDY)
    if path.is_dir() and not (path / MANIFEST).exists():
        inside = [found for found in (path / FINAL, *reversed(step_folders(path))) if found.exists()]
        why = f"{MANIFEST} is missing" if path.name.startswith("step_") else "it is the folder of a run" if inside else "a folder"
        raise UserError(str(path), f"not a checkpoint ({why})", f"did you mean {inside[0]}?" if inside else REMEDY)
    if not verified and (problem := fault(path)) is not None:
        remedy = f"{REMEDY}, or remove {FINAL_MANIFEST} if it was changed on purpose" if problem.startswith(FINAL) else REMEDY
        raise UserError(str(path), f"not a checkpoint ({problem})", remedy)
    try:
        state, sections, tokenizer_model = _step_contents(path) if path.is_dir() else _final_contents(path)
    except UserError:
        raise
    except Exception as error:  # a foreign or cut file fails in a dozen ways, all of which mean the same here
        raise UserError(str(path), f"not a checkpoint ({type(error).__name__})", REMEDY) from None
    return Checkpoint(
        config=config.build(RunConfig, state["config"], str(path)),
        tokenizer_model=tokenizer_model,
        progress=state["progress"],
        ledger=state["ledger"],
        scaler=state["scaler"],
        kernels=state["kernels"],
        model=sections["model"],
        ema=sections["ema"] if state["has_ema"] else None,
        optimizer=sections["optimizer"],
        window=sections["window"],
        kernel_state=sections["kernel_state"],
    )


Contents = tuple[dict[str, Any], dict[str, dict[str, Tensor]], bytes]
"""State, tensors by section, and the tokenizer."""


def _step_contents(folder: Path) -> Contents:
    from safetensors.torch import load_file

    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    _check_keys(state, folder)
    sections: dict[str, dict[str, Tensor]] = {section: {} for section in SECTIONS}
    for name, tensor in load_file(folder / TENSORS).items():
        section, _, inner = name.partition("/")
        sections[section][inner] = tensor
    return state, sections, (folder / TOKENIZER).read_bytes()


def _final_contents(path: Path) -> Contents:
    payload = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(payload, dict) or not {"format", "config", "model", "progress"} <= payload.keys():
        raise UserError(str(path), "not a checkpoint of this toolkit", REMEDY)
    _check_keys(payload, path)
    sections: dict[str, dict[str, Tensor]] = {section: payload.get(section) or {} for section in SECTIONS}
    return payload, sections, payload["tokenizer_model"]


def _check_keys(state: Mapping[str, Any], path: Path) -> None:
    check_format(state["format"], path)
    missing = {"config", "progress", "ledger", "scaler", "kernels", "has_ema"} - state.keys()
    if missing:
        raise UserError(str(path), f"not a checkpoint ({', '.join(sorted(missing))} missing)", REMEDY)


def check_format(found: Any, path: Path) -> None:
    """Refuse a checkpoint of another format.

    Raises:
        UserError: it is older or newer.
    """
    with suppress(TypeError):
        if found > FORMAT:
            raise UserError(str(path), f"format {found} is newer than {FORMAT}", "update the toolkit")
        if found < FORMAT:
            raise UserError(str(path), f"format {found} is older than {FORMAT}", "read it with the version that wrote it")
