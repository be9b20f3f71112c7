"""Benchmark data: from a mirror folder ``<org>/<name>/<config or default>/<split>.parquet`` (or ``.jsonl``), or from the hub.

A mirror is read into memory as it is: a local data set folder given to ``datasets`` would be served from a cache that ignores edits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets

from minifoundation.errors import UserError


def go_offline_unless_reachable() -> None:
    """Ask the hub once; without an answer let the libraries use what they have cached, instead of 25 s of retries for each data set."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # the HTTP library behind the session differs between versions
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


class Splits(dict[str, Any]):
    """The splits of a data set in a mirror folder; a missing one is a UserError."""

    def __init__(self, folder: Path) -> None:
        super().__init__({path.stem: _read(path) for path in sorted(folder.glob("*")) if path.suffix in (".parquet", ".jsonl")})
        self.folder = folder

    def __missing__(self, split: str) -> Any:
        file = self.folder / f"{split}.parquet"
        raise UserError(str(file), "no such file in --data_dir", "add it as .parquet or .jsonl, or leave --data_dir out")


def _read(path: Path) -> datasets.Dataset:
    if path.suffix == ".jsonl":
        return datasets.Dataset.from_list([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    from pyarrow import parquet

    return datasets.Dataset.from_list(parquet.read_table(path).to_pylist())


def read_dataset(data_dir: Path | None, path: str, name: str | None, options: dict[str, Any] | None = None) -> Any:
    """Return the splits of data set ``path``, configuration ``name``, from the mirror folder or else the hub.

    Raises:
        UserError: it is in neither, in one line that names it.
    """
    if data_dir is not None:
        folder = data_dir / path / (name or "default")
        if not folder.is_dir():
            raise UserError(str(folder), "no such folder in --data_dir", "add <split>.parquet or .jsonl there, or leave --data_dir out")
        return Splits(folder)
    go_offline_unless_reachable()
    label = path if name is None else f"{path} ({name})"
    try:
        return datasets.load_dataset(path, name, **(options or {}))
    except Exception as error:  # connection, HTTP and cache errors of three libraries
        remedy = "connect to the internet, or give a mirror folder with --data_dir"
        raise UserError(f"data set {label}", f"not cached and not reachable ({first_line(error)})", remedy) from error


def first_line(error: BaseException) -> str:
    """Return an error of a library as one line."""
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}"[:300]
