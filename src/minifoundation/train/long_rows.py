"""Rows that begin with long documents, read more often than these occur."""

from __future__ import annotations

from minifoundation.config import RunConfig
from minifoundation.data.lengths import Documents, LongRows, PackedRows, buckets
from minifoundation.data.loader import Loader, Readable, part_of
from minifoundation.errors import UserError
from minifoundation.train.plan import Plan
from minifoundation.train.printer import Say


def searched(config: RunConfig) -> int:
    """Return the tokens of the corpus that are looked through for long documents."""
    return config.data.search_tokens or config.train.tokens


def by_lengths(windows: Loader, config: RunConfig, planned: Plan, say: Say) -> Loader:
    """Return the loader that reads the long documents of each source of ``windows`` more often than they occur, and packs the short ones.

    ``data.long_share`` of the rows begin with a long document: fewer where these would be read more than ``data.long_repeats`` times, more
    where they would be read less often than the text as a whole.

    Raises:
        UserError: no document of a source is as long as ``data.min_tokens``; where that is auto, its windows are kept, and it is said.
    """
    data, seq_len, seed = config.data, config.train.seq_len, config.train.seed
    auto = data.min_tokens == "auto"
    least = seq_len // 2 if auto else data.min_tokens
    assert isinstance(least, int)
    rows = planned.steps * planned.samples_per_step
    sources: dict[str, Readable] = {}
    weights: dict[str, float] = {}
    for source, samples in windows.sources.items():
        order = samples.order
        enough, tokens = [], 0
        for shard in order.turns:
            if tokens < searched(config) * data.weights[source]:
                enough.append(order.shards.train[shard])
                tokens += enough[-1].n_tokens
        documents = Documents.of(enough, order.shards.manifest.eos)
        long = LongRows(documents, order, min_tokens=least, seed=seed)
        packed = PackedRows(documents, order, min_tokens=least, seed=seed)
        weight = data.weights[source]
        once = long.samples_per_epoch / (weight * rows)  # the share under which each piece is read once
        as_often_as_all = once * weight * rows * seq_len / tokens
        share = min(1.0, max(as_often_as_all, min(data.long_share, data.long_repeats * once)))
        if not packed.samples_per_epoch:
            share = 1.0
        if long.samples_per_epoch == 0:
            longest = int(documents.length.max())
            problem = f"no document of {source} has {least:,} tokens: the longest of {tokens:,} tokens searched has {longest:,}"
            if not auto:
                raise UserError("data.min_tokens", problem, "lower it, or raise data.search_tokens to look further")
            say(f"warning: {problem}; rows are windows of {seq_len:,} tokens cut from documents one after the other (data.search_tokens)")
            sources[source], weights[source] = samples, round(weight, 9)
            continue
        for line in _lengths(source, long, least, share, rows * weight):
            say(line)
        sources |= {part_of(source, "long"): long}
        weights |= {part_of(source, "long"): round(weight * share, 9)}
        if share < 1:
            sources |= {part_of(source, "short"): packed}
            weights |= {part_of(source, "short"): round(weight * (1 - share), 9)}
    return Loader(sources, weights, mask_documents=data.mask_documents)


def _lengths(source: str, long: LongRows, least: int, share: float, rows: float) -> list[str]:
    """Return lines for a person: the share of each length in what was searched and in what is trained on."""
    times = share * rows / long.samples_per_epoch
    lines = [
        f"  lengths  {source}: {share:.0%} of the rows begin with one of {long.samples_per_epoch:,} pieces of documents of {least:,} "
        f"tokens and more (read {times:.2g} times); the rest is short documents, packed"
    ]
    for bucket in buckets(long, share):
        if bucket.documents:
            most = "and more" if bucket.longest is None else f"to {bucket.longest:,}"
            lines.append(
                f"           {bucket.shortest:>7,} {most:<10} {bucket.documents:>9,} documents, {bucket.corpus:6.1%} of the tokens there, "
                f"{bucket.mix:6.1%} of those trained on"
            )
    return lines
