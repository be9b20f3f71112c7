"""Requests as token ids: encoded in parallel, and kept on disk by their content, so that the next evaluation reads them.

``tokenizers`` encodes a list of texts on every core. What is kept is named by the hash of the tokenizer and of the texts: another
tokenizer, other shots or edited data are other names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Encode = Callable[[Sequence[str]], list[list[int]]]

BLOCK = 4096
"""Texts encoded at once: enough for every core, and their lists of Python ints stay small."""
KEPT = 100
"""Files that stay in the folder; the oldest go first."""


def cache_folder() -> Path:
    """Return where encoded requests are kept: ``minifoundation/requests`` in the user's cache folder (``XDG_CACHE_HOME``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minifoundation" / "requests"


@dataclass(frozen=True)
class Encoded:
    """The ids of a request: those of its context, and those of its continuation after it."""

    context: Ids
    continuation: Ids


def encoded_pairs(pairs: Sequence[tuple[str, str]], encode: Encode, *, identity: str, folder: Path | None) -> list[Encoded]:
    """Return the ids of (context, continuation) pairs, whose contexts are not empty, as lm-eval defines them.

    Spaces at the end of a context belong to the continuation, whose ids are what the whole text has beyond the ids of the context.

    Args:
        encode: texts to ids, the beginning-of-text token included where the model expects it.
        identity: of ``encode``; part of the name under which the ids are kept.
        folder: where to keep them; None keeps nothing.
    """
    if not pairs:  # of a benchmark whose texts stand alone, such as BLiMP
        return []
    moved = []
    for context, continuation in pairs:
        bare = context.rstrip()
        moved.append((bare, context[len(bare) :] + continuation))
    contexts = list(dict.fromkeys(context for context, _ in moved))
    kept = folder / f"{_name(moved, identity)}.npz" if folder is not None else None
    ids = _read(kept) if kept is not None else None
    if ids is None:
        ids = _encoded(moved, contexts, encode)
        if kept is not None:
            _keep(ids, kept)
    number = {context: place for place, context in enumerate(contexts)}
    return [Encoded(ids[number[context]], ids[len(contexts) + place]) for place, (context, _) in enumerate(moved)]


def _encoded(moved: Sequence[tuple[str, str]], contexts: Sequence[str], encode: Encode) -> list[Ids]:
    """Return the ids of the contexts, then those of the continuations."""
    ids: list[Ids] = []
    for start in range(0, len(contexts), BLOCK):
        ids += [np.array(one, dtype=np.int64) for one in encode(contexts[start : start + BLOCK])]
    length = {context: len(one) for context, one in zip(contexts, ids, strict=True)}
    for start in range(0, len(moved), BLOCK):
        block = moved[start : start + BLOCK]
        whole = encode([context + continuation for context, continuation in block])
        ids += [np.array(one[length[context] :], dtype=np.int64) for one, (context, _) in zip(whole, block, strict=True)]
    return ids


def _name(moved: Sequence[tuple[str, str]], identity: str) -> str:
    digest = hashlib.sha256(identity.encode())
    for pair in moved:
        for text in pair:
            raw = text.encode("utf-8", "surrogatepass")
            digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def _read(path: Path) -> list[Ids] | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            ends = np.cumsum(stored["lengths"])
            return list(np.split(stored["ids"].astype(np.int64), ends[:-1]))
    except Exception:  # not there, or damaged: zipfile meets a flipped bit with a dozen kinds of error
        return None


def _keep(ids: Sequence[Ids], path: Path) -> None:
    """Write ``ids`` whole or not at all; a folder that cannot be written to costs the next evaluation time, nothing else."""
    part = path.with_name(f"{path.stem}-{os.getpid()}.part")
    flat: npt.NDArray[Any] = np.concatenate(ids)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            np.savez(file, lengths=np.array([len(one) for one in ids]), ids=flat.astype(np.uint16 if flat.max() < 1 << 16 else np.uint32))
        part.replace(path)
        for old in sorted(path.parent.glob("*.npz"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)
    except OSError:
        with suppress(OSError):
            part.unlink()
