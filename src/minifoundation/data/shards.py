"""Token shards on disk: ids as raw little-endian integers, document after document, and the manifest that names every file.

A folder grows by pairs: a shard to train on and the held-out documents met while it was made. A pair is there when the
manifest names it, which is written last.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from minifoundation.data.tokenizer import EOS
from minifoundation.errors import UserError
from minifoundation.wording import counted

MANIFEST = "manifest.json"
PART = ".part"
REMEDY = "make it again: minifoundation prepare --rebuild, with the options the folder was made with"
"""For a shard file that is not what was written."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Place(_Model):
    """A place in a corpus: the document that comes next, counted within its piece and block."""

    piece: int = 0
    file: int = 0
    """In which the piece begins, counted in the order of the corpus."""
    start: int = 0
    """Where in the file: a byte or a row group, so that the pieces can be listed from here on."""
    block: int = 0
    document: int = 0


class Record(_Model):
    """One shard file."""

    file: str = Field(pattern=r"^\w[\w.-]*$")
    """A name in the folder of the manifest, never a path."""
    tokens: int
    """Ids, those of bos and eos included."""
    documents: int
    text_bytes: int
    """UTF-8 bytes of the documents' text."""
    sha256: str


class Pair(_Model):
    """The two files of one number; one that would be empty is not written."""

    start: Place
    """Of its first document, so that this pair alone can be made again."""
    train: Record | None
    held_out: Record | None

    @property
    def records(self) -> tuple[Record, ...]:
        return tuple(record for record in (self.train, self.held_out) if record)


class Manifest(_Model):
    """What a folder was made from, what it holds, and where in the source it stands."""

    format: Literal[2] = 2
    """Places count pieces of ``pieces.PIECE_BYTES`` and blocks of ``encode.BLOCK_BYTES``: other sizes are another format."""
    dtype: Literal["uint16", "uint32"]
    eos: int = EOS
    """The id that ends each document, and stands nowhere else; after it the next one begins."""
    tokenizer_sha256: str
    source: dict[str, Any]
    settings: dict[str, Any]
    """The settings of ``data`` that the bytes of the shards depend on."""
    pairs: tuple[Pair, ...] = ()
    place: Place = Place()
    """Where to go on from: everything before it is dealt with."""
    documents_read: int = 0
    """Documents of the source before ``place``."""
    complete: bool = False
    """The source has been read to its end."""
    held_out_dropped: int = 0
    """Held-out documents over the cap: neither kept nor trained on."""
    skipped: dict[str, int] = {}
    """Rows of the source that are no document, by reason."""

    @property
    def train_tokens(self) -> int:
        return sum(pair.train.tokens for pair in self.pairs if pair.train)

    @property
    def held_out_tokens(self) -> int:
        return sum(pair.held_out.tokens for pair in self.pairs if pair.held_out)


@dataclass(frozen=True)
class Shard:
    """A shard file that is there in full."""

    path: Path
    dtype: np.dtype[Any]
    n_tokens: int
    documents: int
    text_bytes: int

    def tokens(self) -> np.memmap[Any, np.dtype[Any]]:
        """Return the ids, shape (n_tokens,), mapped from the file."""
        return np.memmap(self.path, self.dtype, mode="r", shape=(self.n_tokens,))


@dataclass(frozen=True)
class Shards:
    """A folder of shards as it stood when it was opened."""

    folder: Path
    manifest: Manifest
    train: tuple[Shard, ...]
    held_out: tuple[Shard, ...]

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """Return the shards that the folder's manifest names.

        Raises:
            UserError: there is no manifest, it is damaged, or a shard is missing or not of its recorded size.
        """
        manifest = manifest_of(folder)
        return cls(
            folder,
            manifest,
            tuple(_shard(folder, manifest, pair.train) for pair in manifest.pairs if pair.train),
            tuple(_shard(folder, manifest, pair.held_out) for pair in manifest.pairs if pair.held_out),
        )

    @property
    def train_tokens(self) -> int:
        return self.manifest.train_tokens

    @property
    def held_out_tokens(self) -> int:
        return self.manifest.held_out_tokens

    @property
    def complete(self) -> bool:
        """The whole corpus is in these shards."""
        return self.manifest.complete

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text to a token of the held-out split; of the train split where nothing is held out."""
        shards = self.held_out or self.train
        return sum(shard.text_bytes for shard in shards) / sum(shard.n_tokens for shard in shards)


class ShardWriter:
    """Writes one shard file, which takes its name only when it is finished."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path = path
        self.tokens = 0
        self._documents = 0
        self._text_bytes = 0
        self._dtype = _little_endian(dtype)
        self._sha256 = hashlib.sha256()
        self._part = path.with_name(path.name + PART)
        self._stream = self._part.open("wb")

    def add(self, ids: npt.ArrayLike, text_bytes: int, documents: int = 1) -> None:
        """Append documents of ``text_bytes`` bytes of text in all, each with its bos and eos."""
        raw = np.ascontiguousarray(ids, dtype=self._dtype).data
        self._stream.write(raw)
        self._sha256.update(raw)
        self.tokens += len(raw)
        self._documents += documents
        self._text_bytes += text_bytes

    def finish(self) -> Record | None:
        """Make the file durable under its name and return its record; None, and no file, when nothing was added."""
        if self.tokens == 0:
            self.discard()
            return None
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._part.replace(self.path)
        return Record(
            file=self.path.name,
            tokens=self.tokens,
            documents=self._documents,
            text_bytes=self._text_bytes,
            sha256=self._sha256.hexdigest(),
        )

    def discard(self) -> None:
        """Leave nothing of the file behind."""
        with suppress(OSError):  # a full disk also refuses what was still buffered
            self._stream.close()
        self._part.unlink(missing_ok=True)


def read_manifest(folder: Path) -> Manifest | None:
    """Return the folder's manifest, None where there is none.

    Raises:
        UserError: the manifest is damaged or of another format.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
        return Manifest.model_validate_json(raw)
    except FileNotFoundError:
        return None
    except ValidationError:
        old = re.match(rb'{\s*"format": ?1\b', raw)
        problem = "was written by an older version (format 1)" if old else "is not a manifest of token shards"
        raise UserError(str(path), problem, f"remove {folder} and prepare again, or give another data.shards_dir") from None


def manifest_of(folder: Path) -> Manifest:
    """Return the folder's manifest.

    Raises:
        UserError: there is none, or as ``read_manifest``.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(str(folder), f"holds no token shards ({MANIFEST} is missing)", "make them with minifoundation prepare")
    return manifest


def intact(folder: Path, record: Record) -> bool:
    """Return whether the file of ``record`` is there and still what was written; reads all of it."""
    try:
        with (folder / record.file).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == record.sha256
    except FileNotFoundError:
        return False


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the folder's manifest whole or not at all."""
    path = folder / MANIFEST
    part = path.with_name(path.name + PART)
    try:
        with part.open("wb") as stream:
            stream.write(manifest.model_dump_json(indent=1).encode())
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _shard(folder: Path, manifest: Manifest, record: Record) -> Shard:
    path = folder / record.file
    dtype = _little_endian(manifest.dtype)
    size = path.stat().st_size if path.is_file() else None
    expected = record.tokens * dtype.itemsize
    if size != expected:
        found = "is missing" if size is None else f"has {counted(size, 'byte')} instead of {expected:,}"
        raise UserError(str(path), found, REMEDY)
    return Shard(path, dtype, record.tokens, record.documents, record.text_bytes)


def _little_endian(dtype: str) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")
