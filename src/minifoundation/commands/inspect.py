"""``inspect``: what is in token shards, and what a checkpoint has read."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from minifoundation.config import InspectOptions
from minifoundation.data import survey
from minifoundation.data.ledger import Entry
from minifoundation.data.shards import Shards
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.errors import UserError
from minifoundation.wording import counted

SHOWN = 400
"""Characters of a sample that are printed."""


def inspect(options: InspectOptions) -> None:
    """Print what ``options`` names: a folder of shards, a checkpoint, or both."""
    if options.shards is None and options.checkpoint is None:
        raise UserError("inspect", "nothing to look at", "give --shards or --checkpoint")
    if options.shards is None:
        for name, value in (("--verify", options.verify), ("--tokenizer", options.tokenizer), ("--plot", options.plot)):
            if value:
                raise UserError(name, "there are no shards to look into", "give --shards too; the ledger of the checkpoint names them")
    if options.plot is not None and options.plot.suffix != ".png":
        raise UserError("--plot", f"{options.plot} is not a .png", "give the histogram a name that ends in .png")
    if options.shards is not None:
        opened = [Shards.open(folder) for folder in survey.folders(options.shards)]
        for shards in opened:
            _shards(options, shards, alone=len(opened) == 1)
        if len(opened) > 1:
            _shares(opened)
    if options.checkpoint is not None:
        _checkpoint(options.checkpoint)


def _shards(options: InspectOptions, shards: Shards, *, alone: bool) -> None:
    manifest = shards.manifest
    splits = {"train": survey.split(shards.train, manifest.eos), "held out": survey.split(shards.held_out, manifest.eos)}
    end = "the whole corpus" if shards.complete else "more can follow"
    read = counted(manifest.documents_read, "document")
    click.echo(f"{shards.folder}: {counted(len(manifest.pairs), 'shard')} of {manifest.dtype}, {end}, {read} read")
    for name, found in splits.items():
        if not found.tokens:
            click.echo(f"  {name:<9} nothing")
            continue
        low, middle, high = np.quantile(found.lengths, (0.05, 0.5, 0.95))
        lengths = f"median {middle:,.0f}, 90% from {low:,.0f} to {high:,.0f}, longest {found.lengths.max():,}"
        documents = counted(len(found.lengths), "document")
        click.echo(f"  {name:<9} {found.tokens:,} tokens in {documents}, {found.text_bytes / found.tokens:.2f} bytes a token")
        click.echo(f"  {'':<9} tokens a document: {lengths}")
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(manifest.skipped.items()))
    click.echo(f"  skipped   {skipped or 'no rows'}; {counted(manifest.held_out_dropped, 'held-out document')} over the cap left out")
    if options.verify:
        survey.check(shards)
        click.echo("  verified  every file is what was written (sha256)")
    if options.tokenizer is not None:
        for place, text in survey.samples(shards, Tokenizer.load(options.tokenizer), options.samples):
            click.echo(f"\n--- {place}\n{text if len(text) <= SHOWN else text[: SHOWN // 2] + ' [...] ' + text[-SHOWN // 2 :]}")
    if options.plot is not None and splits["train"].tokens:
        plot = options.plot
        if not alone:
            plot = plot.with_name(f"{plot.stem}-{shards.folder.name}{plot.suffix}")
        _plot(splits["train"].lengths, plot)
        click.echo(f"  plot      {plot}")


def _shares(opened: list[Shards]) -> None:
    total = sum(shards.train_tokens for shards in opened)
    click.echo(f"{total:,} training tokens in all")
    for shards in opened:
        click.echo(f"  {shards.train_tokens / max(1, total):7.2%}  {shards.folder.name}")


def _plot(lengths: np.ndarray, path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot", "matplotlib is not installed", "pip install -e '.[eval]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    bins = np.geomspace(max(1, lengths.min()), lengths.max() + 1, 40)
    axes.hist(lengths, bins=list(bins), weights=lengths / lengths.sum())
    axes.set(xscale="log", xlabel="tokens a document", ylabel="share of the training tokens")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _checkpoint(path: Path) -> None:
    from minifoundation.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(path)
    train, data, progress = checkpoint.config.train, checkpoint.config.data, checkpoint.progress
    click.echo(f"{path}: {progress['phase']}, step {progress['step']:,}, {progress['tokens']:,} of {train.tokens:,} tokens")
    click.echo(
        f"  place     sample {progress['sample']:,} of {train.seq_len} tokens, seed {train.seed}; documents masked: {data.mask_documents}"
    )
    if origin := progress.get("imported_from"):
        click.echo(f"  began     from the weights of {origin}, imported: what those had read is not known")
    bits = progress["held_out_bits_per_byte"]
    click.echo(f"  held out  {'not evaluated' if bits is None else f'{bits:.4f} bits per byte'}")
    if skipped := progress.get("skipped"):
        click.echo(f"  skipped   {counted(len(skipped), 'step')}, the last {skipped[-1]['step']:,}: {skipped[-1]['reason']}")
    for first, end in progress.get("stepped_over", []):
        click.echo(f"  left out  samples {first:,} to {end - 1:,}, at which the run went back")
    for number, entry in enumerate(Entry(**kept) for kept in checkpoint.ledger):
        _entry(entry, number)


def _entry(entry: Entry, number: int) -> None:
    if number == 0:
        click.echo(f"  {'read in':<9} {'share':>7} {'tokens':>16} {'epochs':>9}  source")
    epochs = "under 1" if entry.epochs is None else f"{entry.epochs:.2f}"
    part = f" ({entry.part} documents)" if entry.part else ""
    click.echo(f"  {entry.phase:<9} {entry.share:7.2%} {entry.tokens:16,} {epochs:>9}  {entry.source}{part}")
    last = f"{entry.shards} from number {entry.first_shard} on, sha256 {entry.shards_sha256[:12]}"
    click.echo(f"  {'':<9} {counted(entry.samples, 'sample')}; shards of {entry.folder}: {last}")
    corpus = ", ".join(f"{name} {value}" for name, value in entry.corpus.items())
    click.echo(f"  {'':<9} corpus: {corpus}; tokenizer {entry.tokenizer_sha256[:12]}")
