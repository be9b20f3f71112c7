"""``prepare``: corpus to token shards, by hand."""

from __future__ import annotations

import math
import os
import socket
import time
import uuid
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minifoundation import config, launch
from minifoundation.config import PrepareConfig, PrepareOptions, RunConfig
from minifoundation.errors import Interrupted, UserError
from minifoundation.wording import counted

if TYPE_CHECKING:
    from minifoundation.data.engines import Engine
    from minifoundation.data.shards import Shards
    from minifoundation.data.tokenizer import Tokenizer
    from minifoundation.distributed import World


def prepare(options: PrepareOptions, values: dict[str, Any]) -> None:
    """Make token shards with the YAML of ``options`` (that of a whole run will do) overlaid by ``values`` of the command line.

    Several processes (torchrun) share the pieces of the corpus.
    """
    from_yaml = config.read_yaml(options.config) if options.config else {}
    of_a_run = RunConfig.model_fields.keys() - PrepareConfig.model_fields.keys()
    settings = config.merged({name: value for name, value in from_yaml.items() if name not in of_a_run}, values)
    chosen = config.build(PrepareConfig, settings, f"{options.config}, command line" if options.config else "command line")
    try:
        if launch.world_size() > 1:
            _together(options, chosen)
        else:  # does without torch, which takes seconds to import
            from minifoundation.data.engines import cluster

            tokenizer = _tokenizer(options, chosen)
            with cluster(options.engine, chosen.data.shards_dir, slurm=options.slurm, workers=chosen.data.workers) as engine:
                _make(options, chosen, tokenizer, engine)
    except KeyboardInterrupt:
        raise Interrupted("stopped; complete shards are kept, and the same command continues after them") from None


def _tokenizer(options: PrepareOptions, chosen: PrepareConfig) -> Tokenizer:
    from minifoundation.data.prepare import refuse_unusable, tokenizer_for
    from minifoundation.data.tokenizer import Tokenizer

    there = options.tokenizer_out / "tokenizer.model"
    path = chosen.tokenizer.path or (there if there.exists() else None)
    found = None if path is None else Tokenizer.load(path)
    if chosen.data.mix:  # a mistake in the last source should not show after hours of work on the first
        refuse_unusable(chosen.data, found)
    if found is not None and chosen.tokenizer.path is not None:
        return found
    if found is not None:
        click.echo(f"tokenizer: {there} is there already, and is used; --tokenizer_out names another place for a new one")
    return tokenizer_for(chosen.tokenizer, chosen.data, options.tokenizer_out)


def _make(options: PrepareOptions, chosen: PrepareConfig, tokenizer: Tokenizer, engine: Engine | None) -> None:
    from minifoundation.data.prepare import prepare_shards, rebuilt_files, shards_folder
    from minifoundation.data.shards import Shards

    data = chosen.data
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


def _together(options: PrepareOptions, chosen: PrepareConfig) -> None:
    """Have the first process make the shards, and all of them do the pieces.

    Raises:
        UserError: another engine is asked for, or not all see the folder of the shards; as ``_make``, on every process.
    """
    from minifoundation.container import cores
    from minifoundation.data.ranks import Helper, Leader
    from minifoundation.distributed import join, leave

    if options.engine != "local":
        problem = f"{options.engine} under torchrun, which shares the work already"
        raise UserError("--engine", problem, "leave it out, or start one process without torchrun")
    with join(with_gpu=False) as world:
        workers = max(1, (chosen.data.workers or cores()) // world.local_size)
        at_once = sum(world.of_all(workers))
        with suppress(FileNotFoundError):  # absolute paths need no such folder
            os.chdir(world.agreed(Path.cwd))  # relative ones mean everywhere what they mean on the first machine
        _share(chosen.data.shards_dir, world)
        tokenizers: list[Tokenizer] = []
        world.agreed(lambda: tokenizers.append(_tokenizer(options, chosen)))
        with closing(Helper(world.store, world.rank, workers)) as helper:
            finished = False

            def make() -> None:
                nonlocal finished
                with closing(Leader(world.store, helper, ahead=3 * at_once, ranks=world.size, lost=leave)) as engine:
                    _make(options, chosen, tokenizers[0], engine)
                finished = True

            if not world.is_first:
                helper.serve(leave)
            try:
                world.agreed(make)
                world.wait()  # the first process may hold the table itself
            except RuntimeError as error:  # torch's word for a process that is gone
                if not world.is_first:
                    raise UserError("torchrun", "the first process is gone", "the same command continues after what is done") from error
                if not finished:  # else the shards are there, and who is gone had nothing of them in hand
                    raise


def _share(folder: Path, world: World) -> None:
    """Refuse a folder that is not the same one for all processes, by a file that each writes and the first looks for."""
    from minifoundation.data.assemble import VISIBLE_SECONDS

    name = world.agreed(lambda: f".probe-{uuid.uuid4().hex}")
    mine = folder / f"{name}-{world.rank}"
    try:
        with world.together():
            folder.mkdir(parents=True, exist_ok=True)
            mine.touch()
        hosts = world.of_all(socket.gethostname())
        with world.together():
            patience = time.monotonic() + VISIBLE_SECONDS
            for rank, host in enumerate(hosts if world.is_first else ()):
                while not (folder / f"{name}-{rank}").exists():
                    if time.monotonic() > patience:
                        remedy = "give --data.shards_dir a folder that all machines share"
                        raise UserError(str(folder), f"is another folder on {host} (rank {rank})", remedy)
                    time.sleep(0.1)
    finally:
        mine.unlink(missing_ok=True)


def _show(shards: Shards, tokenizer: Tokenizer) -> None:
    manifest = shards.manifest
    held_out = sum(shard.documents for shard in shards.held_out)
    dropped = f", {manifest.held_out_dropped:,} more left out" if manifest.held_out_dropped else ""
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(manifest.skipped.items()))
    end = "the end of the corpus" if shards.complete else "more can follow"
    click.echo(f"{shards.folder}: {counted(len(shards.train), 'shard')}, {end}")
    click.echo(f"  train      {shards.train_tokens:,} tokens in {counted(sum(shard.documents for shard in shards.train), 'document')}")
    click.echo(f"  held out   {shards.held_out_tokens:,} tokens in {counted(held_out, 'document')}{dropped}")
    click.echo(f"  text       {shards.bytes_per_token:.2f} bytes a token; tokenizer {tokenizer.path}")
    click.echo(f"  skipped    {skipped or 'no rows'}")
