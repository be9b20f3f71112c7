"""Benchmark data: from a mirror folder ``<org>/<name>/<config or default>/<split>.parquet`` (or ``.jsonl``), or from the hub.

A mirror is read into memory as it is: a local data set folder given to ``datasets`` would be served from a cache that ignores edits.
``manifest.json`` at its top, where there is one, holds the hash of every file; a file that is not what it says is not read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minifoundation.errors import UserError

MANIFEST = "manifest.json"
SUFFIXES = (".parquet", ".jsonl")
SEAL = "write it again with eval-data check --seal"
PULL = "pull it again with eval-data pull, or accept it with eval-data check --seal"


def files(data_dir: Path) -> list[Path]:
    """Return the data files of a mirror."""
    return sorted(path for path in data_dir.rglob("*") if path.suffix in SUFFIXES)


def read_manifest(data_dir: Path) -> dict[str, str] | None:
    """Return the sha256 of every file of a mirror by its relative path, None where there is no manifest.

    Raises:
        UserError: the manifest is damaged, or that of something else.
    """
    path = data_dir / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(str(path), "is damaged: not JSON", SEAL) from None
    hashes = content.get("sha256") if isinstance(content, dict) else None
    if not isinstance(hashes, dict):
        raise UserError(str(path), "is not a manifest of a mirror", "give the folder of a mirror, or move the file away")
    return hashes


def seal(data_dir: Path, written: Sequence[Path] | None = None) -> int:
    """Write the manifest of a mirror as it lies there, and return the number of its files.

    Args:
        written: where there is a manifest already, only these are entered, since by what it says of the others damage is seen.

    Raises:
        UserError: there is no data, or the manifest of something else; or, with ``written``, a damaged one.
    """
    known = None
    try:
        known = read_manifest(data_dir)
    except UserError as error:
        if written is not None or error.remedy != SEAL:
            raise
    if written is None or known is None:
        known, written = {}, files(data_dir)
    if not written:
        raise UserError(str(data_dir), f"holds no data ({', '.join(SUFFIXES)})", "give the folder of a mirror")
    hashes = dict(sorted((known | {str(path.relative_to(data_dir)): sha256(path) for path in written}).items()))
    part = data_dir / f"{MANIFEST}.part"
    part.write_text(json.dumps({"format": 1, "sha256": hashes}, indent=1) + "\n", encoding="utf-8")
    part.replace(data_dir / MANIFEST)
    return len(hashes)


def faults(data_dir: Path, hashes: dict[str, str]) -> list[str]:
    """Return what in a mirror is not as its manifest says, one line a file."""
    there = {str(path.relative_to(data_dir)) for path in files(data_dir)}
    missing = [f"{name}: missing" for name in sorted(hashes.keys() - there)]
    foreign = [f"{name}: not in the manifest" for name in sorted(there - hashes.keys())]
    changed = [f"{name}: changed" for name in sorted(there & hashes.keys()) if sha256(data_dir / name) != hashes[name]]
    return [*missing, *changed, *foreign]


def fingerprint(data_dir: Path | None) -> str | None:
    """Return what tells the content of a mirror from another: the hash over its files' hashes; None for the hub."""
    if data_dir is None:
        return None
    digest = hashlib.sha256()
    for path in files(data_dir):
        digest.update(f"{path.relative_to(data_dir)} {sha256(path)}\n".encode())
    return digest.hexdigest()


def sha256(path: Path) -> str:
    """Return the hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def go_offline_unless_reachable() -> None:
    """Ask the hub once; without an answer let the libraries use what they have cached, instead of 25 s of retries for each data set."""
    import datasets
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # the HTTP library behind the session differs between versions
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


class Splits(dict[str, Any]):
    """The splits of a data set in a mirror folder; a missing one is a UserError.

    Raises:
        UserError: a file is not what the mirror's manifest says.
    """

    def __init__(self, data_dir: Path, folder: Path) -> None:
        self.folder = folder
        hashes = read_manifest(data_dir)
        found = [path for path in sorted(folder.glob("*")) if path.suffix in SUFFIXES]
        for path in found:
            expected = hashes.get(str(path.relative_to(data_dir))) if hashes is not None else None
            if hashes is not None and expected != sha256(path):
                problem = "is not in the mirror's manifest" if expected is None else "has changed since the mirror's manifest was written"
                raise UserError(str(path), problem, PULL)
        super().__init__({path.stem: read_file(path) for path in found})

    def __missing__(self, split: str) -> Any:
        file = self.folder / f"{split}.parquet"
        raise UserError(str(file), "no such file in --data_dir", "add it as .parquet or .jsonl, or leave --data_dir out")


def read_file(path: Path) -> Any:
    """Return the documents of one file of a mirror; raises a UserError that names the file when it cannot be read."""
    import datasets
    from pyarrow import parquet

    try:
        if path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:  # str.splitlines would cut at U+2028 and U+0085 too
                return datasets.Dataset.from_list([json.loads(line) for line in file])
        return datasets.Dataset.from_list(parquet.read_table(path).to_pylist())
    except (OSError, ValueError, TypeError, AttributeError) as error:  # the last two where lines are not objects of one form
        raise UserError(str(path), f"cannot be read ({first_line(error)})", "replace the file") from None


def read_dataset(data_dir: Path | None, path: str, name: str | None, options: dict[str, Any] | None = None) -> Any:
    """Return the splits of data set ``path``, configuration ``name``, from the mirror folder or else the hub.

    Raises:
        UserError: it is in neither, in one line that names it.
    """
    if data_dir is not None:
        folder = data_dir / path / (name or "default")
        if not folder.is_dir():
            raise UserError(str(folder), "no such folder in --data_dir", "add <split>.parquet or .jsonl there, or leave --data_dir out")
        return Splits(data_dir, folder)
    import datasets

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
