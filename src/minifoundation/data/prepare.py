"""Corpus to token shards: documents in a fixed order, encoded in batches, cut into shards at document ends.

The shards do not depend on how many tokens were asked for, on threads, or on where an earlier run was stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from minifoundation.config import DataConfig, TokenizerConfig
from minifoundation.data.shards import PART, Manifest, Pair, Shards, ShardWriter, read_manifest, write_manifest
from minifoundation.data.sources import documents, hub_corpus, source_id
from minifoundation.data.tokenizer import Tokenizer, train_tokenizer
from minifoundation.errors import UserError

BATCH_BYTES = 4 * 1024 * 1024
"""Text given to the tokenizer at once: enough to keep its threads busy, little enough to keep memory flat."""

SETTINGS = ("shard_tokens", "held_out", "held_out_tokens", "max_document_bytes")
"""Settings of ``data`` that the bytes of the shards depend on, beside the source."""


def prepare_shards(config: DataConfig, tokenizer: Tokenizer, *, tokens: int | None, threads: int | None) -> Shards:
    """Return shards with at least ``tokens`` training tokens, or the whole corpus; make those that are not there yet.

    Only whole shards are made, so there may be more tokens than asked for, and a later call that asks for more goes on after
    the last document read.

    Args:
        tokens: training tokens wanted; None is the whole corpus.
        threads: of the tokenizer; None is all cores.

    Raises:
        UserError: the corpus is not there, is unreadable, holds nothing to train on, or is not the one (or not cut by the
            settings) that the folder was made from; another process is writing the folder.
        OSError: the disk is full; complete shards are kept and nothing half-written stays.
    """
    folder = shards_folder(config, tokenizer)
    manifest = _manifest(folder, config, tokenizer)
    if not _suffices(manifest, tokens):
        folder.mkdir(parents=True, exist_ok=True)
        with _alone_in(folder):
            for left in folder.glob(f"*{PART}"):
                left.unlink()
            _extend(folder, _manifest(folder, config, tokenizer), config, tokenizer, tokens, threads or os.cpu_count() or 1)
    shards = Shards.open(folder)
    if shards.train_tokens == 0:
        raise UserError("data.held_out", f"all {shards.manifest.documents_read:,} documents fell into the held-out split", "lower it")
    return shards


def shards_folder(config: DataConfig, tokenizer: Tokenizer) -> Path:
    """Return the folder for this corpus and tokenizer: a readable name and a hash of both."""
    source = config.source if hub_corpus(config.source) else str(Path(config.source).expanduser().resolve())
    key = json.dumps([source, config.text_column, tokenizer.sha256])
    slug = re.sub(r"[^a-z0-9]+", "-", Path(source).name.lower()).strip("-")[:40] or "corpus"
    return config.shards_dir / f"{slug}-{hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()[:8]}"


def tokenizer_for(tokenizer: TokenizerConfig, data: DataConfig, out: Path) -> Tokenizer:
    """Return the tokenizer of ``out/tokenizer.model``; without one, first put the given or a newly trained one there.

    Raises:
        UserError: the one that is there is not the one given, or not of the kind or size asked for.
    """
    model = out / "tokenizer.model"
    if not model.exists():
        if tokenizer.path is None:
            texts = (text for text in documents(data) if not is_held_out(text.encode(), data.held_out))
            return train_tokenizer(texts, tokenizer, model)
        given = Tokenizer.load(tokenizer.path)
        out.mkdir(parents=True, exist_ok=True)
        part = model.with_name(model.name + PART)
        shutil.copyfile(given.path, part)
        part.replace(model)
    found = Tokenizer.load(model)
    remedy = f"remove {model} to replace it, or choose another folder"
    if tokenizer.path is not None:
        if Tokenizer.load(tokenizer.path).sha256 != found.sha256:
            raise UserError("tokenizer.path", f"{tokenizer.path} is not the tokenizer that is already in {out}", remedy)
    elif found.kind != tokenizer.kind or found.vocab_size > tokenizer.vocab_size:
        asked = f"{tokenizer.kind} of {tokenizer.vocab_size:,} pieces"
        raise UserError("tokenizer", f"{asked} asked for, but {model} is {found.kind} of {found.vocab_size:,}", remedy)
    return found


def is_held_out(text: bytes, share: float) -> bool:
    """Return whether a document belongs to the held-out split: by its text alone, so equal documents are never on both sides."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") < share * 2**64


def _manifest(folder: Path, config: DataConfig, tokenizer: Tokenizer) -> Manifest:
    """Return the folder's manifest, or a new one.

    Raises:
        UserError: the folder was made from another corpus or with other settings.
    """
    new = Manifest(
        dtype="uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        tokenizer_sha256=tokenizer.sha256,
        source=source_id(config),
        settings=config.model_dump(mode="json", include=set(SETTINGS)),
    )
    old = read_manifest(folder)
    if old is None:
        return new
    remedy = f"remove {folder}, or give another data.shards_dir"
    for name in SETTINGS:
        if old.settings.get(name) != new.settings[name]:
            raise UserError(
                f"data.{name}",
                f"{new.settings[name]} here, but {folder} was made with {old.settings.get(name)}",
                f"set it to that, {remedy}",
            )
    if old.source != new.source:
        raise UserError("data.source", f"{config.source} has changed since {folder} was made from it", remedy)
    if old.tokenizer_sha256 != new.tokenizer_sha256:
        raise UserError("tokenizer", f"is not the one {folder} was made with", remedy)
    return old


def _suffices(manifest: Manifest, tokens: int | None) -> bool:
    return manifest.complete or (tokens is not None and manifest.train_tokens >= tokens)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system gives back when this process ends, however it ends."""
    import fcntl

    with (folder / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                str(folder),
                f"is being written by another process (pid {lock.read()})",
                "wait until it is done, then run the same line again",
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _extend(folder: Path, manifest: Manifest, config: DataConfig, tokenizer: Tokenizer, tokens: int | None, threads: int) -> None:
    """Add pairs to the folder until it holds ``tokens`` training tokens or the corpus ends."""
    skipped: Counter[str] = Counter()
    stream = documents(config, skip=manifest.documents_read, skipped=skipped)
    writing = _Writing(folder, manifest, config)
    try:
        with tqdm(
            total=tokens, initial=manifest.train_tokens, unit="tok", unit_scale=True, desc=f"preparing {Path(config.source).name}"
        ) as bar:
            for batch in _batches(stream, skipped):
                encoded = tokenizer.encode_documents([text for text, _ in batch], threads)
                for (text, skipped_so_far), ids in zip(batch, encoded, strict=True):
                    writing.add(text, ids)
                    if writing.train.tokens >= config.shard_tokens:
                        manifest = writing.commit(skipped_so_far)
                        if _suffices(manifest, tokens):
                            return
                        writing = _Writing(folder, manifest, config)
                bar.update(manifest.train_tokens + writing.train.tokens - bar.n)
        writing.commit(skipped, complete=True)
    except OSError as error:
        error.filename = error.filename or str(folder)
        raise
    finally:
        writing.discard()


def _batches(stream: Iterator[str], skipped: Counter[str]) -> Iterator[list[tuple[str, dict[str, int]]]]:
    """Yield documents in batches of about BATCH_BYTES, each with the count of skipped rows when it was read."""
    batch: list[tuple[str, dict[str, int]]] = []
    size = 0
    so_far: dict[str, int] = {}
    for text in stream:
        if skipped != so_far:
            so_far = dict(skipped)
        batch.append((text, so_far))
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Writing:
    """The pair that is being written, beside the manifest of those that are complete."""

    def __init__(self, folder: Path, manifest: Manifest, config: DataConfig) -> None:
        self._folder = folder
        self._manifest = manifest
        self._config = config
        self._documents = 0
        self._dropped = 0
        number = len(manifest.pairs)
        self.train = ShardWriter(folder / f"train-{number:05d}.bin", manifest.dtype)
        self._held_out = ShardWriter(folder / f"held_out-{number:05d}.bin", manifest.dtype)

    def add(self, text: str, ids: npt.NDArray[np.integer[Any]]) -> None:
        """Take one document into the split it belongs to."""
        raw = text.encode()
        self._documents += 1
        if not is_held_out(raw, self._config.held_out):
            self.train.add(ids, len(raw))
        elif self._manifest.held_out_tokens + self._held_out.tokens < self._config.held_out_tokens:
            self._held_out.add(ids, len(raw))
        else:
            self._dropped += 1

    def commit(self, skipped: Mapping[str, int], *, complete: bool = False) -> Manifest:
        """Make the pair part of the folder and return the new manifest."""
        pair = Pair(train=self.train.finish(), held_out=self._held_out.finish())
        old = self._manifest
        manifest = old.model_copy(
            update={
                "pairs": (*old.pairs, pair) if pair.train or pair.held_out else old.pairs,
                "documents_read": old.documents_read + self._documents,
                "held_out_dropped": old.held_out_dropped + self._dropped,
                "skipped": dict(skipped),
                "complete": complete,
            }
        )
        write_manifest(self._folder, manifest)
        return manifest

    def discard(self) -> None:
        """Leave nothing behind of what was not committed."""
        self.train.discard()
        self._held_out.discard()
