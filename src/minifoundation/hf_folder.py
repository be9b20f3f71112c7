"""A model folder in Hugging Face's form: which files have to lie in it, whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minifoundation.errors import UserError

CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order in which transformers looks for them."""
POINTER = b"version https://git-lfs"
"""Begins what a clone without Git LFS has in place of a large file."""
AGAIN = "copy the folder again, or write it again with export_hf"


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of ``config.json``, with a ``model_type`` at least.

    Raises:
        UserError: it is absent or damaged.
    """
    path = folder / CONFIG
    content = read_object(path)
    if not isinstance(content.get("model_type"), str):
        raise UserError(str(path), "is not a model configuration (no model_type)", AGAIN)
    return content


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of such a folder.

    Raises:
        UserError: it is absent or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UserError(str(path), "is damaged: not a JSON object", AGAIN)
    return content


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights, the one or those that an index names; those of safetensors are whole by their headers.

    Raises:
        UserError: there are none, or one that the index names is missing, damaged or elsewhere.
    """
    first = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if first is None:
        raise UserError(str(folder), f"holds no weights ({', '.join(WEIGHTS[::2])}, or an index of several files)", AGAIN)
    names = _named(folder / first) if first.endswith(".json") else [first]
    files = [folder / name for name in names]
    for file in files:
        _refuse_damaged(file)
    return files


def _named(index: Path) -> list[str]:
    """Return the files that an index of weights names."""
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(str(index), "names no files of weights", AGAIN)
    for name in names.values():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(str(index), f"names {name}, which is outside the folder", AGAIN)
    return sorted(set(names.values()))


def _refuse_damaged(file: Path) -> None:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise UserError(str(file), "no such file, and the model needs it", AGAIN)
    if file.suffix != ".safetensors":
        return
    try:
        with safe_open(file, framework="pt"):  # reads the header, and compares it with the length
            pass
    except SafetensorError as error:
        with file.open("rb") as stream:
            if stream.read(len(POINTER)) == POINTER:
                raise UserError(str(file), "is a pointer of Git LFS, not the weights", f"run git lfs pull in {file.parent}") from None
        raise UserError(str(file), f"is damaged ({error})", AGAIN) from None
