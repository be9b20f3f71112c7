"""``prepare``: corpus to token shards, by hand."""

from __future__ import annotations

from typing import Any

import click

from minifoundation import config
from minifoundation.config import PrepareConfig, PrepareOptions, RunConfig
from minifoundation.errors import Interrupted


def prepare(options: PrepareOptions, values: dict[str, Any]) -> None:
    """Make token shards with the YAML of ``options`` (that of a whole run will do) overlaid by ``values`` of the command line."""
    from_yaml = config.read_yaml(options.config) if options.config else {}
    of_a_run = RunConfig.model_fields.keys() - PrepareConfig.model_fields.keys()
    settings = config.merged({name: value for name, value in from_yaml.items() if name not in of_a_run}, values)
    chosen = config.build(PrepareConfig, settings, f"{options.config}, command line" if options.config else "command line")
    from minifoundation.data.prepare import prepare_shards, tokenizer_for

    try:
        tokenizer = tokenizer_for(chosen.tokenizer, chosen.data, options.tokenizer_out)
        shards = prepare_shards(chosen.data, tokenizer, tokens=options.tokens, threads=chosen.tokenizer.threads)
    except KeyboardInterrupt:
        raise Interrupted("stopped; complete shards are kept, and the same line goes on after them") from None

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
