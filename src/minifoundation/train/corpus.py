"""The data of a phase: its tokenizer, its shards as far as they are needed to begin, and where in them it begins or goes on."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from minifoundation.checkpoint import Checkpoint, write_whole
from minifoundation.config import RunConfig
from minifoundation.data.assemble import VISIBLE_SECONDS
from minifoundation.data.held_out import HeldOut
from minifoundation.data.ledger import Entry
from minifoundation.data.loader import POLL_SECONDS, Loader, source_of
from minifoundation.data.mixture import Mixture
from minifoundation.data.prepare import made_otherwise, refuse_gone, refuse_unusable, tokenizer_for
from minifoundation.data.samples import Order, Samples
from minifoundation.data.shards import MANIFEST, Shards
from minifoundation.data.sources import place_of
from minifoundation.data.supply import Want, prepared
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.distributed import World
from minifoundation.errors import UserError
from minifoundation.train.long_rows import by_lengths, searched
from minifoundation.train.plan import Plan
from minifoundation.train.printer import Say
from minifoundation.train.state import Progress, Start
from minifoundation.wording import counted

AT_ONCE = 4_194_304
"""Tokens that are made before training begins, to the end of the shard: the work of seconds. The rest is made while it runs."""


@dataclass(frozen=True)
class TrainingData:
    """What a phase reads, and where it begins."""

    tokenizer: Tokenizer
    loader: Loader
    held_out: HeldOut
    progress: Progress
    to_make: tuple[Want, ...]
    """What is wanted of the sources whose shards are not all there."""


def training_data(
    config: RunConfig,
    planned: Plan,
    world: World,
    say: Say,
    *,
    resumed: Checkpoint | None,
    start: Start | None,
    stepped_over: list[list[int]],
) -> TrainingData:
    """Return the data of a phase, with at least the samples of its first steps there.

    The first process makes them; the others wait, then open what it made, and make nothing.

    Args:
        stepped_over: samples to leave out, beside those that the checkpoint names.

    Raises:
        UserError: the corpus cannot be read, is too small for one step, or is not the one that the checkpoint has read; a process does not
            see what the first one has made.
    """
    made: list[TrainingData] = []
    opened = partial(_opened, config, planned, say, resumed=resumed, start=start, stepped_over=stepped_over)

    def make() -> list[Path]:
        made.append(opened())
        shards = [samples.order.shards.folder / MANIFEST for samples in made[0].loader.sources.values()]
        return [made[0].tokenizer.path, *shards]

    files = world.agreed(make)
    with world.together():
        if not made:
            _wait_for(files)
        return made[0] if made else opened()


def _wait_for(files: Iterable[Path]) -> None:
    """Return when all ``files`` are there: what one machine has written may take a while to appear on another.

    Raises:
        UserError: one does not come.
    """
    patience = time.monotonic() + VISIBLE_SECONDS
    for file in files:
        while not file.exists():
            if time.monotonic() > patience:
                problem = f"was made by the first process, and {socket.gethostname()} does not see it"
                raise UserError(str(file), problem, "give --out_dir and data.shards_dir folders that all machines share")
            time.sleep(POLL_SECONDS)


def _opened(
    config: RunConfig,
    planned: Plan,
    say: Say,
    *,
    resumed: Checkpoint | None,
    start: Start | None,
    stepped_over: list[list[int]],
) -> TrainingData:
    before = resumed or (start.checkpoint if start else None)
    tokenizer = run_tokenizer(config, before)
    if config.data.mix:  # a mistake in the last source, before shards of the first are made
        refuse_unusable(config.data, tokenizer)
    progress = _progress(planned, resumed=resumed, start=start, stepped_over=stepped_over)
    sources = sorted(config.data.weights)
    weights = config.data.weights
    assert isinstance(config.train.batch_size, int)
    mixture = Mixture([weights[source] for source in sources])
    by_length = config.data.min_tokens is not None
    seq_len = config.train.seq_len
    size = planned.samples_per_step
    in_all = mixture.counts(progress.end(planned.steps - progress.step, size))
    at_once = mixture.counts(progress.place(size) + max(AT_ONCE // seq_len, size))
    entries = [Entry(**kept) for kept in (before.ledger if before else [])]
    ledger = {place_of(entry.source): entry for entry in entries}  # the last one of each source, however it is spelled
    read = ledger | {place_of(entry.source): entry for entry in entries if entry.samples}
    known = {source: place_of(source) for source in sources}
    shards: dict[str, Shards] = {}
    wants: list[Want] = []
    searched_rows = -(-searched(config) // seq_len)
    for source, samples, first_samples, in_search in zip(sources, in_all, at_once, mixture.counts(searched_rows), strict=True):
        if resumed is None and known[source] in ledger:
            last = read[known[source]]
            progress.first_shards[source] = _first_unread(last, source, _tokens(last, entries), config, tokenizer, say)
        if by_length:  # what is long is known once all of it has been looked through
            samples = first_samples = max(-(-round(searched(config) * weights[source]) // seq_len), in_search)
        if (other := made_otherwise(source, config.data, tokenizer)) is not None:
            why = "of another tokenizer, column or place"
            say(f"data: shards of {source} are made now; those in {other}, of a source of that name, are {why} and not used")
        want = Want(source, progress.first_shards.setdefault(source, 0), samples, seq_len)
        shards[source] = prepared(want, first_samples, config.data, tokenizer)
        if resumed is not None:
            _same_shards(ledger[known[source]], shards[source])
        wants.append(want)
    if start is not None and resumed is None and ledger and ledger.keys().isdisjoint(known.values()):
        say(f"data: another corpus than the phase before ({', '.join(one.source for one in ledger.values())}); reading it from the start")
    windows = Loader(
        {
            source: Samples(shards[source], seq_len=seq_len, seed=config.train.seed, first_shard=progress.first_shards[source])
            for source in sources
        },
        weights,
        mask_documents=config.data.mask_documents,
    )
    loader = by_lengths(windows, config, planned, say) if by_length else windows
    _enough(windows, planned)
    held_out = HeldOut(
        windows,
        samples=searched_rows if by_length else planned.steps * planned.samples_per_step,
        tokens=config.train.eval_tokens,
        batch_size=config.train.batch_size,
        text_bytes=tokenizer.text_bytes,
        share=config.data.held_out,
    )
    counts = loader.counts(progress.end(planned.steps - progress.step, size))  # of windows that may be more than was looked through
    wants = [replace(want, samples=max(want.samples, counts.get(want.source, 0))) for want in wants]
    to_make = tuple(want for want in wants if not want.met(shards[want.source], want.samples))
    for want in to_make:  # now, and not when training has come to the last shard there is
        refuse_gone(want.source, config.data, tokenizer)
    return TrainingData(tokenizer, loader, held_out, progress, to_make)


def _progress(planned: Plan, *, resumed: Checkpoint | None, start: Start | None, stepped_over: list[list[int]]) -> Progress:
    """Return how far the phase has come."""
    if resumed:
        progress = Progress(**resumed.progress)
    elif start:
        progress = Progress(phase=start.phase, imported_from=start.checkpoint.progress.get("imported_from"))
    else:
        progress = Progress()
    progress.samples_per_step = planned.samples_per_step
    progress.stepped_over = [list(one) for one in sorted({(first, end) for first, end in [*progress.stepped_over, *stepped_over]})]
    return progress


def refuse_absent(config: RunConfig) -> None:
    """Refuse a tokenizer or a corpus that is not there, and shards made with other settings, where this can be known without a network.

    Raises:
        UserError: one of them cannot be read or used.
    """
    if config.tokenizer.path is not None:
        Tokenizer.load(config.tokenizer.path)
    refuse_unusable(config.data, given_tokenizer(config, say=lambda _line: None))


def run_tokenizer(config: RunConfig, before: Checkpoint | None) -> Tokenizer:
    """Return the run's tokenizer, made where there is none; that of a checkpoint is put in place first: a later phase can use no other."""
    folder = config.out_dir / "tokenizer"
    if before is None:
        return tokenizer_for(config.tokenizer, config.data, folder)
    model = folder / "tokenizer.model"
    given = config.tokenizer.path
    if given is not None and given.exists() and Tokenizer.load(given).model != before.tokenizer_model:
        raise UserError(
            "tokenizer.path",
            f"{given} is not the tokenizer the weights were trained with",
            "leave it out: the checkpoint holds the right one",
        )
    if not model.exists() or model.read_bytes() != before.tokenizer_model:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(model, before.tokenizer_model)
    return Tokenizer.load(model)


def given_tokenizer(config: RunConfig, say: Say) -> Tokenizer | None:
    """Return the tokenizer that is there before a run begins, in its folder or given; None where one is to be trained.

    Raises:
        UserError: it cannot be read.
    """
    own = config.out_dir / "tokenizer" / "tokenizer.model"
    if own.exists() and config.tokenizer.path is None:  # of a run that was broken off, perhaps on another corpus
        say(f"tokenizer: {own} is there already, and is used")
    path = own if own.exists() else config.tokenizer.path
    return None if path is None else Tokenizer.load(path)


def with_vocabulary(config: RunConfig, before: Checkpoint | None, tokenizer: Tokenizer | None, say: Say) -> RunConfig:
    """Return ``config`` with a model of the vocabulary that is trained: a checkpoint's, or the tokenizer's padded to a multiple of 128.

    Args:
        tokenizer: None is one that is to be trained, with as many pieces as were asked for, or fewer.

    Raises:
        UserError: fp8 cannot be had with so many.
    """
    if before is not None:
        size = before.config.model.vocab_size
    else:
        pieces, has = (config.tokenizer.vocab_size, "is to have") if tokenizer is None else (tokenizer.vocab_size, "has")
        size = -(-pieces // 128) * 128
        if size != config.model.vocab_size:
            say(f"model.vocab_size: {size:,} instead of {config.model.vocab_size:,}, since the tokenizer {has} {pieces:,} pieces")
    if config.train.precision == "fp8" and size % 16:
        problem = f"{size} in the checkpoint is not a multiple of 16, which train.precision fp8 needs"
        raise UserError("model.vocab_size", problem, "take bf16")
    return config.replaced(model={"vocab_size": size})


def _tokens(last: Entry, entries: Iterable[Entry]) -> int:
    """Return what the phase of ``last`` has read of its source; where documents are told apart by length it has two entries."""
    alike = (last.source, last.phase, last.first_shard, last.part is None)
    parts = {one.part: one.tokens for one in entries if (one.source, one.phase, one.first_shard, one.part is None) == alike}
    return sum(parts.values())


def _first_unread(read: Entry, source: str, tokens: int, config: RunConfig, tokenizer: Tokenizer, say: Say) -> int:
    """Return the first shard that an earlier phase did not read; 0 when it read another corpus, or all of this one.

    Args:
        source: as it is spelled now.
        tokens: that the phase has read of it, long and short rows together.
    """
    name = f"{source}: " if config.data.mix else ""
    if read.samples == 0:
        return read.first_shard
    # As many shards as were read must be there before they can be compared, and one more to tell whether the corpus goes on.
    want = Want(source, read.first_shard + read.shards, 1, 1)
    shards = prepared(want, 1, config.data, tokenizer)
    order = Order(shards, config.train.seq_len, read.first_shard)
    if order.sha256(read.shards) != read.shards_sha256:
        say(f"data: {name}other shards than the phase before has read; reading them from the start")
        return 0
    if read.shards >= len(order.turns):
        say(f"data: {name}the phase before has come to the end of the corpus; reading it again from the start")
        return 0
    unread = order.turns[read.shards]
    say(f"data: {name}starting at shard {unread}, after the {tokens:,} tokens that the phase before has seen")
    return unread


def _same_shards(read: Entry, shards: Shards) -> None:
    """Refuse shards that are not those which the checkpoint has read."""
    if Order(shards, read.seq_len, read.first_shard).sha256(read.shards) != read.shards_sha256:
        raise UserError(
            str(shards.folder),
            "its shards are not those that the checkpoint has read",
            "give the data.shards_dir and the corpus of the run, or begin another run with --out_dir",
        )


def _enough(loader: Loader, planned: Plan) -> None:
    for (source, samples), count in zip(loader.sources.items(), loader.mixture.counts(planned.samples_per_step), strict=True):
        there = samples.samples_per_epoch
        if there is not None and there < count:
            raise UserError(
                source,
                f"holds {counted(there, 'sample')} of {samples.seq_len} tokens, and one step takes {count:,}",
                "give more text, or lower --batch_size, --grad_accum or --seq_len",
            )


def described(data: TrainingData, planned: Plan) -> list[str]:
    """Return lines for a person: tokens there, and how often each source is read."""
    lines = []
    in_all = data.loader.counts(planned.steps * planned.samples_per_step)
    shares = dict(zip(data.loader.sources, data.loader.mixture.shares, strict=True))
    making = {want.source for want in data.to_make}
    for name_of, samples in data.loader.sources.items():
        source, part = source_of(name_of)
        if part == "short":
            continue
        shards = samples.order.shards
        name = "" if len(in_all) == 1 else f"{source}: " if part else f"{source} {float(100 * shares[source]):.3g}%: "
        text = f"{name}{shards.train_tokens:,} tokens in {counted(len(shards.train), 'shard')}"
        if part is None and (there := samples.samples_per_epoch) is not None and (len(in_all) > 1 or in_all[source] > there):
            text += f", read {in_all[source] / there:.1f} times"
        if source in making:
            text += ", more is made while training runs"
        lines.append(f"  data     {text}; held out {shards.held_out_tokens:,} tokens")
        if shards.manifest.skipped:
            lines.append("  skipped  " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(shards.manifest.skipped.items())))
    return lines + data.held_out.lacking()
