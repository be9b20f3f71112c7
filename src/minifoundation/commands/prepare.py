"""``prepare``: corpus to token shards, by hand."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from minifoundation import config
from minifoundation.config import PrepareConfig, PrepareOptions, RunConfig
from minifoundation.errors import Interrupted

if TYPE_CHECKING:
    from minifoundation.data.shards import Shards
    from minifoundation.data.tokenizer import Tokenizer


def prepare(options: PrepareOptions, values: dict[str, Any]) -> None:
    """Make token shards with the YAML of ``options`` (that of a whole run will do) overlaid by ``values`` of the command line."""
    from_yaml = config.read_yaml(options.config) if options.config else {}
    of_a_run = RunConfig.model_fields.keys() - PrepareConfig.model_fields.keys()
    settings = config.merged({name: value for name, value in from_yaml.items() if name not in of_a_run}, values)
    chosen = config.build(PrepareConfig, settings, f"{options.config}, command line" if options.config else "command line")
    from minifoundation.data.engines import cluster
    from minifoundation.data.prepare import prepare_shards, rebuilt_files, shards_folder, tokenizer_for
    from minifoundation.data.shards import Shards

    data = chosen.data
    try:
        tokenizer = tokenizer_for(chosen.tokenizer, data, options.tokenizer_out)
        with cluster(options.engine, data.shards_dir, slurm=options.slurm, workers=data.workers) as engine:
            for source, weight in data.weights.items():
                if options.rebuild:
                    files = ", ".join(map(str, rebuilt_files(source, data, tokenizer, engine=engine)))
                    click.echo(f"{source}: " + (f"made again: {files}" if files else "every shard is what was written"))
                if options.rebuild and options.tokens is None:  # what is there is mended, no more is made
                    shards = Shards.open(shards_folder(source, data, tokenizer))
                else:
                    tokens = None if options.tokens is None else math.ceil(options.tokens * weight)
                    shards = prepare_shards(source, data, tokenizer, tokens=tokens, engine=engine)
                _show(shards, tokenizer)
    except KeyboardInterrupt:
        raise Interrupted("stopped; complete shards are kept, and the same line goes on after them") from None


def _show(shards: Shards, tokenizer: Tokenizer) -> None:
    manifest = shards.manifest
    held_out = sum(shard.documents for shard in shards.held_out)
    dropped = f", {manifest.held_out_dropped:,} more left out" if manifest.held_out_dropped else ""
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(manifest.skipped.items()))
    end = "the end of the corpus" if shards.complete else "more can follow"
    click.echo(f"{shards.folder}: {len(shards.train)} shards, {end}")
    click.echo(f"  train      {shards.train_tokens:,} tokens in {sum(shard.documents for shard in shards.train):,} documents")
    click.echo(f"  held out   {shards.held_out_tokens:,} tokens in {held_out:,} documents{dropped}")
    click.echo(f"  text       {shards.bytes_per_token:.2f} bytes a token; tokenizer {tokenizer.path}")
    click.echo(f"  skipped    {skipped or 'no rows'}")
