"""Corpus to token shards: the folder of a corpus, its lock, its growth and its repair.

The shards do not depend on how many tokens were asked for, on the engine and its workers, or on where an earlier run was stopped.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from minifoundation.config import DataConfig, TokenizerConfig
from minifoundation.container import cores
from minifoundation.data.assemble import blocks, manifests
from minifoundation.data.encode import BLOCK_BYTES, WORK, Encoding, filtered, is_held_out
from minifoundation.data.engines import Engine, in_process, local
from minifoundation.data.pieces import pieces
from minifoundation.data.rows import all_documents
from minifoundation.data.shards import PART, Manifest, Shards, intact, manifest_of, read_manifest, write_manifest
from minifoundation.data.sources import Corpus, find_corpus, is_gone, is_remote, path_of, place_of
from minifoundation.data.tokenizer import Tokenizer, train_tokenizer
from minifoundation.errors import UserError
from minifoundation.lock import held
from minifoundation.wording import counted

SETTINGS = ("shard_tokens", "held_out", "held_out_tokens", "max_document_bytes", "filters", "dedup")
"""Settings of ``data`` that the bytes of the shards depend on, beside the source."""

REBUILD = ".rebuild-"
"""Begins the name of the folder in which a shard is made again."""

SMALL_BYTES = 8 * 1024 * 1024
"""A corpus of less is encoded in this process, which takes no longer than starting another."""


def prepare_shards(
    source: str,
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    tokens: int | None,
    engine: Engine | None = None,
    wait_for_lock: bool = False,
    show_progress: bool = True,
) -> Shards:
    """Return shards with at least ``tokens`` training tokens, or the whole corpus; make those that are not there yet.

    Only whole shards are made, so there may be more tokens than asked for, and a later call that asks for more goes on after
    the last document taken.

    Args:
        source: one of ``config.weights``.
        tokens: training tokens wanted; None is the whole corpus.
        engine: does the work; None is ``config.workers`` processes of this machine, or this one for a small corpus.
        wait_for_lock: while another process makes shards in the folder, wait for those instead of failing.

    Raises:
        UserError: the corpus is not there, is unreadable, holds nothing to train on, or is not the one (or not cut by the
            settings) that the folder was made from; another process is writing the folder.
        OSError: the disk is full; complete shards are kept and nothing half-written stays.
    """
    preparation = _Preparation(source, config, tokenizer, engine)
    folder = preparation.folder
    if not preparation.suffices(tokens):
        with held(folder, partial(preparation.suffices, tokens) if wait_for_lock else None) as ours:
            if ours:
                preparation.extend(tokens, show_progress)
    elif not is_remote(source) and not is_gone(source):  # shards that are there are of use without a network, and without the text
        preparation.corpus()
    shards = Shards.open(folder)
    if shards.train_tokens == 0:
        raise UserError("data.held_out", "every document fell into the held-out split", f"lower it, and remove {folder}")
    return shards


def rebuilt_files(source: str, config: DataConfig, tokenizer: Tokenizer, *, engine: Engine | None = None) -> list[Path]:
    """Return the shard files that were damaged or missing, having made them again; every file is read and its sha256 compared.

    Raises:
        UserError: as ``prepare_shards``; there are no shards; the corpus no longer gives what the manifest says of a shard.
    """
    preparation = _Preparation(source, config, tokenizer, engine)
    folder = preparation.folder
    if not manifest_of(folder).pairs:
        raise UserError(str(folder), "holds no token shards yet", "make them with minifoundation prepare")
    with held(folder):
        preparation.tidy()
        manifest = manifest_of(folder)
        damaged = [[folder / record.file for record in pair.records if not intact(folder, record)] for pair in manifest.pairs]
        for number, files in enumerate(damaged):
            if files:
                preparation.rebuild(number)
    return [path for files in damaged for path in files]


def shards_folder(source: str, config: DataConfig, tokenizer: Tokenizer) -> Path:
    """Return the folder for this corpus and tokenizer: a readable name and a hash of both."""
    name = source if is_remote(source) else str(path_of(source).resolve())
    key = json.dumps([name, config.text_column, tokenizer.sha256])
    slug = re.sub(r"[^a-z0-9]+", "-", Path(name).name.lower()).strip("-")[:40] or "corpus"
    return config.shards_dir / f"{slug}-{hashlib.sha256(key.encode(errors='surrogateescape')).hexdigest()[:8]}"


def made_otherwise(source: str, config: DataConfig, tokenizer: Tokenizer) -> Path | None:
    """Return a folder of shards of a source of that name, by another tokenizer or of another column, while there are none by this one."""
    own = shards_folder(source, config, tokenizer)
    if any(own.glob("*.bin")):
        return None
    name = own.name.rpartition("-")[0]
    alike = (folder for folder in sorted(own.parent.glob(f"{name}-*")) if folder.name.rpartition("-")[0] == name)
    return next((folder for folder in alike if any(folder.glob("*.bin"))), None)


def refuse_unusable(config: DataConfig, tokenizer: Tokenizer | None) -> None:
    """Refuse a source that is not there or given twice, and shards made with other settings, before work on any begins; asks no network.

    Args:
        tokenizer: None is one that is still to be trained: there can be no shards of it.

    Raises:
        UserError: the source, or the setting with both values.
    """
    given: dict[Any, str] = {}
    for source in config.weights:
        if (other := given.setdefault(place_of(source), source)) != source:  # its samples would come twice an epoch
            raise UserError("data.mix", f"{other} and {source} are the same text", "name it once, with the sum of both weights")
        shards = None if tokenizer is None else _Preparation(source, config, tokenizer, None).recorded()
        if not is_remote(source) and (shards is None or not is_gone(source)):
            find_corpus(source, config)


def refuse_gone(source: str, config: DataConfig, tokenizer: Tokenizer) -> None:
    """Refuse a corpus of this machine that is no longer there, and of which shards are to be made.

    Raises:
        UserError: it says how much the shards hold.
    """
    if not is_remote(source) and is_gone(source):
        _Preparation(source, config, tokenizer, None).corpus()


def tokenizer_for(tokenizer: TokenizerConfig, data: DataConfig, out: Path) -> Tokenizer:
    """Return the tokenizer of ``out/tokenizer.model``; without one, first put the given or a newly trained one there.

    With ``data.mix`` it is trained on text of all sources, by their weights.

    Raises:
        UserError: the one that is there is not the one given, or not of the kind or size asked for.
    """
    model = out / "tokenizer.model"
    if not model.exists():
        given = None if tokenizer.path is None else Tokenizer.load(tokenizer.path)
        with held(out, model.exists) as ours:  # one that another process is making is waited for
            if not ours or model.exists():
                pass
            elif given is None:
                shares = ((source, int(weight * tokenizer.sample_bytes)) for source, weight in data.weights.items())
                return train_tokenizer(chain.from_iterable(_sample(source, data, size) for source, size in shares), tokenizer, model)
            else:
                part = model.with_name(model.name + PART)
                part.write_bytes(given.model)
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


def _sample(source: str, config: DataConfig, size: int) -> Iterator[str]:
    """Yield the beginning of the source's training documents, ``size`` bytes of text."""
    texts = all_documents(source, config)
    # A filter may edit a document, and the edited one is what is held out or not.
    for text in filtered(texts, config, Counter()) if config.filters else texts:
        raw = text.encode()
        if is_held_out(raw, config.held_out):
            continue
        yield raw[:size].decode(errors="ignore")
        size -= len(raw)
        if size <= 0:
            return


@dataclass(frozen=True)
class _Preparation:
    """What the folder of a source is made from and by."""

    source: str
    config: DataConfig
    tokenizer: Tokenizer
    engine: Engine | None

    @property
    def folder(self) -> Path:
        return shards_folder(self.source, self.config, self.tokenizer)

    def suffices(self, tokens: int | None) -> bool:
        """Return whether the folder holds ``tokens`` training tokens, or all there are."""
        manifest = self.recorded()
        return manifest is not None and _suffices(manifest, tokens)

    def recorded(self) -> Manifest | None:
        """Return the folder's manifest; None while it names no shard, since nothing is bound to its settings then.

        Raises:
            UserError: the folder was made with other settings or by another tokenizer.
        """
        manifest = read_manifest(self.folder)
        if manifest is None or not manifest.pairs:
            return None
        if manifest.tokenizer_sha256 != self.tokenizer.sha256:
            raise UserError("tokenizer", f"is not the one {self.folder} was made with", self._remedy)
        for name, value in self._settings.items():
            if (other := manifest.settings.get(name)) != value:
                problem = f"{_as_typed(value)} here, but {self.folder} was made with {_as_typed(other)}"
                raise UserError(f"data.{name}", problem, f"set it to that, {self._remedy}")
        return manifest

    def corpus(self) -> Corpus:
        """Return the corpus, one of the Hub at the revision the folder was made from.

        Raises:
            UserError: it is not there, or has changed since.
        """
        manifest = self.recorded()
        if manifest is not None and not is_remote(self.source) and is_gone(self.source):
            there = f"those of {manifest.train_tokens:,} tokens in {self.folder}"
            problem = f"{self.source} is no longer there, and is needed for other shards than {there}"
            raise UserError("data.source", problem, "put it back, or ask for no more --tokens than that")
        corpus = find_corpus(self.source, self.config, known=manifest.source if manifest else None)
        if manifest is not None and manifest.source != corpus.id:
            raise self._changed(manifest.source, corpus.id)
        return corpus

    def extend(self, tokens: int | None, show_progress: bool) -> None:
        """Add pairs to the folder until it holds ``tokens`` training tokens or the corpus ends."""
        corpus = self.corpus()
        manifest = self.recorded() or self._begun(corpus)
        if _suffices(manifest, tokens):  # another process was quicker
            return
        self.tidy()
        bar = tqdm(
            total=tokens,
            initial=manifest.train_tokens,
            unit="tok",
            unit_scale=True,
            desc=f"preparing {Path(self.source).name}",
            disable=not show_progress,
        )
        try:
            with bar, closing(self._growth(self.folder, manifest, corpus, bar)) as growth:
                next(grown for grown in growth if _suffices(grown, tokens))
        except OSError as error:
            error.filename = error.filename or str(self.folder)
            raise

    def tidy(self) -> None:
        """Remove what a killed process has left half-made; for the one that holds the folder."""
        for left in self.folder.glob(f"*{PART}"):
            left.unlink()
        for left in self.folder.glob(f"{REBUILD}*"):
            shutil.rmtree(left, ignore_errors=True)

    def rebuild(self, number: int) -> None:
        """Make a pair again, aside, and put it in its place when it is what the manifest says.

        Raises:
            UserError: it is not.
        """
        if not is_remote(self.source) and is_gone(self.source):
            problem = f"{self.source} is no longer there, and damaged shards in {self.folder} are to be made of it again"
            raise UserError("data.source", problem, "put it back, or remove that folder")
        corpus = self.corpus()
        manifest = manifest_of(self.folder)
        pair = manifest.pairs[number]
        before = manifest.model_copy(update={"pairs": manifest.pairs[:number], "place": pair.start, "complete": False})
        with TemporaryDirectory(prefix=REBUILD, dir=self.folder, ignore_cleanup_errors=True) as name:
            aside = Path(name)
            write_manifest(aside, before)
            with tqdm(disable=True) as bar, closing(self._growth(aside, before, corpus, bar)) as growth:
                made = next(growth)
            if made.pairs[number:] != (pair,):
                raise self._changed({}, {})
            for record in pair.records:
                (aside / record.file).replace(self.folder / record.file)

    def _begun(self, corpus: Corpus) -> Manifest:
        """Return the manifest of a folder without shards, written before the work begins: the work is bound to its settings."""
        manifest = Manifest(
            dtype="uint16" if self.tokenizer.vocab_size <= 1 << 16 else "uint32",
            eos=self.tokenizer.special.eos,
            tokenizer_sha256=self.tokenizer.sha256,
            source=corpus.id,
            settings=self._settings,
        )
        if read_manifest(self.folder) != manifest:
            shutil.rmtree(self.folder / WORK, ignore_errors=True)
            write_manifest(self.folder, manifest)
        return manifest

    def _growth(self, folder: Path, manifest: Manifest, corpus: Corpus, bar: tqdm[Any]) -> Generator[Manifest, None, None]:
        """Yield the manifest of ``folder`` each time it has got a pair of shards, and at the end of the corpus."""
        workers = self.config.workers or cores()
        engine = self.engine or (in_process() if _is_small(corpus) else local(workers))
        try:
            following = pieces(corpus, self.config, file=manifest.place.file, start=manifest.place.start)
            # Fewer pieces than workers can only be when there are fewer files, or they are small.
            some = list(islice(following, workers)) if len(corpus.files) < workers else []
            encoding = Encoding(
                folder.absolute(),
                self.config,
                self.tokenizer.path.absolute(),
                self.tokenizer.sha256,
                manifest.dtype,
                threads=max(1, workers // max(1, len(some))) if some else 1,
                removals=self._removals(corpus, engine, show_progress=not bar.disable),
                block_bytes=BLOCK_BYTES,
            )
            encoding.work.mkdir(exist_ok=True)
            encoded = blocks(encoding, chain(some, following), manifest.place, corpus.files, engine, bar)
            for grown in manifests(folder, manifest, encoded, corpus, self.config, bar):
                encoding.discard_before(grown.place)
                if grown.complete:
                    shutil.rmtree(encoding.work, ignore_errors=True)  # a task that was taken for lost may still be writing there
                yield grown
        finally:
            if self.engine is None:
                engine.close()

    def _removals(self, corpus: Corpus, engine: Engine, *, show_progress: bool) -> Path | None:
        if self.config.dedup == "none":
            return None
        if any(file.remote for file in corpus.files):
            raise UserError(
                "data.dedup",
                f"{self.config.dedup} reads the whole corpus beforehand, and {self.source} is read over the network",
                "download it and give its path, or set data.dedup to none",
            )
        from minifoundation.data.dedup import removals

        return removals(corpus, self.config, engine, self.folder / ".dedup", show_progress=show_progress)

    @property
    def _settings(self) -> dict[str, Any]:
        return self.config.model_dump(mode="json", include=set(SETTINGS))

    def _changed(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> UserError:
        """Return the refusal of another corpus than that of the folder, from what the manifest and ``Corpus.id`` say of both."""
        counts = [(of["files"], of["bytes"]) for of in (before, now) if of.get("bytes") is not None]
        sizes = [f"{counted(files, 'file')} of {counted(n_bytes, 'byte')}" for files, n_bytes in counts]
        how = f" ({sizes[0]} then, {sizes[1]} now)" if len(set(sizes)) == 2 else ""
        return UserError("data.source", f"{self.source} has changed since {self.folder} was made from it{how}", self._remedy)

    @property
    def _remedy(self) -> str:
        return f"remove {self.folder}, or give another data.shards_dir"


def _as_typed(value: Any) -> Any:
    """Return the value of a setting as the command line takes it."""
    return (",".join(value) or "none") if isinstance(value, list) else value


def _suffices(manifest: Manifest, tokens: int | None) -> bool:
    return manifest.complete or (tokens is not None and manifest.train_tokens >= tokens)


def _is_small(corpus: Corpus) -> bool:
    return sum(SMALL_BYTES if file.size is None else file.size for file in corpus.files) < SMALL_BYTES
