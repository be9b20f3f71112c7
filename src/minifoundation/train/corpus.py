"""The data of a phase: its tokenizer, its shards as far as they are needed to begin, and where in them it begins or goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from minifoundation.checkpoint import Checkpoint, write_whole
from minifoundation.config import RunConfig
from minifoundation.data.held_out import HeldOut
from minifoundation.data.ledger import Entry
from minifoundation.data.loader import Loader
from minifoundation.data.mixture import Mixture
from minifoundation.data.prepare import tokenizer_for
from minifoundation.data.samples import Order, Samples
from minifoundation.data.shards import Shards
from minifoundation.data.supply import Want, prepared
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.distributed import World
from minifoundation.errors import UserError
from minifoundation.train.plan import Plan
from minifoundation.train.state import Progress, Start

AT_ONCE = 4_194_304
"""Tokens that are made before training begins, to the end of the shard: the work of seconds. The rest is made while it runs."""

Say = Callable[[str], None]


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

    The first process makes them; the others wait, then open what it made.

    Args:
        stepped_over: samples to leave out, beside those that the checkpoint names.

    Raises:
        UserError: the corpus cannot be read, is too small for one step, or is not the one that the checkpoint has read.
    """
    before = resumed or (start.checkpoint if start else None)
    if not world.is_first:
        world.wait()
    tokenizer = _tokenizer(config, before)
    progress = Progress(**resumed.progress) if resumed else Progress(phase=start.phase if start else "pretrain")
    progress.samples_per_step = planned.samples_per_step
    progress.stepped_over = sorted({(first, end): [first, end] for first, end in [*progress.stepped_over, *stepped_over]}.values())
    sources = sorted(config.data.weights)
    weights = config.data.weights
    assert isinstance(config.train.batch_size, int)
    mixture = Mixture([weights[source] for source in sources])
    seq_len = config.train.seq_len
    size = planned.samples_per_step
    in_all = mixture.counts(progress.end(planned.steps - progress.step, size))
    at_once = mixture.counts(progress.place(size) + max(AT_ONCE // seq_len, size))
    ledger = {kept["source"]: Entry(**kept) for kept in (before.ledger if before else [])}  # the last entry of each source
    shards: dict[str, Shards] = {}
    wants: list[Want] = []
    for source, samples, first_samples in zip(sources, in_all, at_once, strict=True):
        if resumed is None and source in ledger:
            progress.first_shards[source] = _first_unread(ledger[source], config, tokenizer, say)
        want = Want(source, progress.first_shards.setdefault(source, 0), samples, seq_len)
        shards[source] = prepared(want, first_samples, config.data, tokenizer)
        if resumed is not None:
            _same_shards(ledger[source], shards[source])
        wants.append(want)
    if start is not None and resumed is None and ledger and ledger.keys().isdisjoint(sources):
        say(f"data: another corpus than the phase before ({', '.join(ledger)}); reading it from the start")
    if world.is_first:
        world.wait()
    loader = Loader(
        {
            source: Samples(shards[source], seq_len=seq_len, seed=config.train.seed, first_shard=progress.first_shards[source])
            for source in sources
        },
        weights,
        mask_documents=config.data.mask_documents,
    )
    _enough(loader, planned)
    held_out = HeldOut(
        loader,
        samples=planned.steps * planned.samples_per_step,
        tokens=config.train.eval_tokens,
        batch_size=config.train.batch_size,
        text_bytes=tokenizer.text_bytes,
    )
    to_make = tuple(want for want in wants if not want.met(shards[want.source], want.samples))
    return TrainingData(tokenizer, loader, held_out, progress, to_make)


def _tokenizer(config: RunConfig, before: Checkpoint | None) -> Tokenizer:
    """Return the run's tokenizer; that of a checkpoint is put in place first, so that a later phase can use no other."""
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
        write_whole(model, before.tokenizer_model)
    return Tokenizer.load(model)


def _first_unread(read: Entry, config: RunConfig, tokenizer: Tokenizer, say: Say) -> int:
    """Return the first shard that an earlier phase did not read; 0 when it read another corpus, or all of this one."""
    name = f"{read.source}: " if config.data.mix else ""
    if read.samples == 0:
        return read.first_shard
    # As many shards as were read must be there before they can be compared, and one more to tell whether the corpus goes on.
    want = Want(read.source, read.first_shard + read.shards, 1, 1)
    shards = prepared(want, 1, config.data, tokenizer)
    order = Order(shards, config.train.seq_len, read.first_shard)
    if order.sha256(read.shards) != read.shards_sha256:
        say(f"data: {name}other shards than the phase before has read; reading them from the start")
        return 0
    if read.shards >= len(order.turns):
        say(f"data: {name}the phase before has come to the end of the corpus; reading it again from the start")
        return 0
    unread = order.turns[read.shards]
    say(f"data: {name}starting at shard {unread}, after the {read.tokens:,} tokens that the phase before has seen")
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
                f"holds {there:,} samples of {samples.seq_len} tokens, and one step takes {count:,}",
                "give more text, or lower --batch_size, --grad_accum or --seq_len",
            )


def described(data: TrainingData, planned: Plan) -> list[str]:
    """Return lines for a person: tokens there, and how often each source is read."""
    lines = []
    in_all = data.loader.counts(planned.steps * planned.samples_per_step)
    shares = dict(zip(data.loader.sources, data.loader.mixture.shares, strict=True))
    making = {want.source for want in data.to_make}
    for source, samples in data.loader.sources.items():
        shards = samples.order.shards
        name = "" if len(in_all) == 1 else f"{source} {float(100 * shares[source]):.3g}%: "
        text = f"{name}{shards.train_tokens:,} tokens in {len(shards.train)} shards"
        if (there := samples.samples_per_epoch) is not None and (len(in_all) > 1 or in_all[source] > there):
            text += f", read {in_all[source] / there:.1f} times"
        if source in making:
            text += ", more is made while training runs"
        lines.append(f"  data     {text}; held out {shards.held_out_tokens:,} tokens")
        if shards.manifest.skipped:
            lines.append("  skipped  " + ", ".join(f"{count:,} {reason}" for reason, count in sorted(shards.manifest.skipped.items())))
        if shards.complete and shards.held_out_tokens <= samples.seq_len:
            few = f"too few documents {f'of {source} ' if name else ''}fell into it to evaluate on"
            lines.append(f"warning: data.held_out: {few}; raise data.held_out or lower data.max_document_bytes")
    return lines
