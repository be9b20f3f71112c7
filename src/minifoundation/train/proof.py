"""What an extension of the context has done: the model before and after it, on the same held-out text and needles."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minifoundation.checkpoint import Checkpoint
from minifoundation.config import RunConfig
from minifoundation.data.held_out import rows_of
from minifoundation.data.mixture import Mixture
from minifoundation.data.prepare import shards_folder
from minifoundation.data.rows import all_documents
from minifoundation.data.shards import Shards
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.runtime import Machine
from minifoundation.train.kernels import Kernels, transformer_for
from minifoundation.train.long_rows import searched
from minifoundation.train.reach import Ids, Needle, Needles, Place, beginnings, edges, longest, loss_by_position, mean_loss, needle_lengths

WORSE = 0.005
"""The share by which the loss of short rows may rise."""

TEXT_TOKENS = 2_000_000
"""Tokens at most that needles are hidden in."""


@dataclass(frozen=True)
class Material:
    """What both models are tried on."""

    original: int
    """Tokens of the context before any extension."""
    length: int
    asked: int
    """How many documents were asked for."""
    documents: list[Ids]
    short: Ids
    """Rows of the original length, from each source by its weight, (rows, original + 1)."""
    needles: Needles
    tries: int


@dataclass(frozen=True)
class Found:
    """What one model made of it."""

    positions: list[Place]
    sliding: list[Place]
    """The same tokens in sliding windows of the original length, what the model can do with the text without reaching further; or none."""
    short: float | None
    """Nats a token in rows of the original length; None where too little text is held out."""
    needles: list[Needle]


def material(config: RunConfig, tokenizer: Tokenizer, *, documents: int, tries: int, source: str | None = None) -> Material:
    """Return what the extension of ``config`` is proved on, from the held-out split of its sources.

    Args:
        documents: at most, that are longer than the original length, the longest first.
        tries: prompts of each task, length and depth.
        source: where the documents, and the text that needles are hidden in, come from instead, as far as ``encoded`` reads it.

    Raises:
        UserError: ``source`` cannot be read.
    """
    weights = config.data.weights
    held_out = [Shards.open(shards_folder(trained_on, config.data, tokenizer)).held_out for trained_on in weights]
    shards = [shard for of_one in held_out for shard in of_one]
    original, length = config.model.original_seq_len, config.train.seq_len
    n_rows = Mixture(list(weights.values())).counts(max(1, config.train.eval_tokens // original))
    read = encoded(source, config, tokenizer, length) if source else beginnings(shards, tokenizer.special.eos, length)
    long, text = _chosen(read, tokenizer, original=original, length=length, count=documents)
    return Material(
        original=original,
        length=length,
        asked=documents,
        documents=long,
        short=np.concatenate([rows_of(of_one, count, original) for of_one, count in zip(held_out, n_rows, strict=True)]),
        needles=Needles(tokenizer.encode, tokenizer.prefix, text, seed=config.train.seed),
        tries=tries,
    )


def encoded(source: str, config: RunConfig, tokenizer: Tokenizer, length: int) -> Iterator[Ids]:
    """Yield the beginnings of the documents of ``source``, ``length`` + 1 ids at most, as ``prepare`` would encode them.

    A corpus of the Hub has no end in practice: they end where as many tokens have been read as are searched for long documents before
    training (``data.search_tokens``), ``TEXT_TOKENS`` at least.
    """
    texts = all_documents(source, config.data)
    left = max(searched(config), TEXT_TOKENS)
    while some := list(itertools.islice(texts, 64)):
        for ids in tokenizer.encode_documents(some):
            yield ids[: length + 1].astype(np.int64)
            left -= len(ids)
            if left <= 0:
                return


def _chosen(read: Iterable[Ids], tokenizer: Tokenizer, *, original: int, length: int, count: int) -> tuple[list[Ids], Ids]:
    """Return the ``count`` longest documents of ``read`` beyond ``original``, and the text for needles: no more than these is held.

    No more is read either once both are complete: documents come cut to ``length`` + 1 ids, and none can be longer.
    """
    beginning: list[Ids] = []

    def until_complete() -> Iterator[Ids]:
        tokens = whole = 0
        for ids in read:
            if tokens < TEXT_TOKENS:
                beginning.append(ids)
            tokens += len(ids)
            whole += len(ids) > length
            yield ids
            if tokens >= TEXT_TOKENS and whole >= count:
                return

    found = longest(until_complete(), longer_than=original, count=count)
    return found, _text(beginning, tokenizer)


def _text(documents: Sequence[Ids], tokenizer: Tokenizer) -> Ids:
    """Return the beginning of the text of ``documents`` without bos and eos."""
    ids = np.concatenate([np.zeros(0, np.int64), *documents])[:TEXT_TOKENS]
    kept: Ids = ids[~np.isin(ids, [tokenizer.special.eos, *tokenizer.prefix])]
    return kept


def found(checkpoint: Checkpoint, on: Material, machine: Machine, *, precision: str, sliding: bool) -> Found:
    """Return what the model of ``checkpoint`` makes of ``on``, under its own RoPE, also beyond the length it is made for.

    Args:
        sliding: read the documents in windows too.
        precision: of compute, the same for both models: else the dtype is compared with them. In fp8, whose scales belong to a run, bf16.
    """
    precision = "bf16" if precision == "fp8" else precision
    config = checkpoint.config.replaced(train={"precision": precision})
    transformer = transformer_for(config, machine, Kernels("auto", "own"))
    transformer.load_state_dict(checkpoint.model)
    transformer.eval()
    lengths = needle_lengths(on.original, on.length)
    text, bounds = len(on.needles.text) > 0, edges(on.original, on.length)
    return Found(
        loss_by_position(transformer, on.documents, bounds, machine.device),
        loss_by_position(transformer, on.documents, bounds, machine.device, window=on.original) if sliding else [],
        mean_loss(transformer, on.short, machine.device) if len(on.short) else None,
        list(on.needles.grid(transformer, lengths, on.tries, machine.device)) if on.tries and text else [],
    )


def described(before: Found, after: Found, on: Material) -> list[str]:
    """Return lines for a person; some begin with "warning": short rows have become worse, or long ones are of no use or not tested."""
    lines = []
    more = "give --proof_data, or hold out more (data.held_out)"
    if on.asked and not before.positions:
        lines.append(f"warning: no document is longer than {on.original:,} tokens, so there is no loss by position; {more}")
    if on.tries and not after.needles:
        lacks, remedy = "there is no text to hide needles in", more
        if len(on.needles.text):
            lacks, remedy = f"rows of {on.length:,} tokens have no room for a needle", "give a longer --seq_len"
        lines.append(f"warning: {lacks}, so none was looked for; {remedy}")
    if before.short is None:
        lines.append(
            f"warning: less than a row of {on.original:,} tokens is held out, so short rows were not compared; raise data.held_out"
        )
    if before.positions:
        lines.append("  loss by position, nats a token (before: of rows as long, and in sliding windows of the original length)")
    for old, window, new in zip(before.positions, before.sliding, after.positions, strict=True):
        nats = f"{old.nats:.3f} before, {window.nats:.3f} in windows, {new.nats:.3f} after"
        lines.append(f"    {old.first:>7,} to {old.last:>7,}: {nats} ({new.documents:,} held-out documents)")
    if beyond := [(window, new) for window, new in zip(before.sliding, after.positions, strict=True) if new.first >= on.original]:
        in_windows, whole = (sum(p.nats * p.tokens for p in side) / sum(p.tokens for p in side) for side in zip(*beyond, strict=True))
        lines.append(f"  beyond {on.original:,}: {in_windows:.4f} before in windows, {whole:.4f} after")
        if whole > in_windows:
            told = "warning: a window of the old length that slides does better than the longer context"
            lines.append(f"{told}; raise --tokens or --lr, or give --data with longer documents")
    if before.short is not None and after.short is not None:
        change = after.short / before.short - 1
        lines.append(f"  rows of the original length: {before.short:.4f} before, {after.short:.4f} after ({change:+.2%})")
        if change > WORSE:
            lines.append(
                f"warning: short rows are {change:.1%} worse, more than {WORSE:.1%}; lower --lr or data.long_share, or raise --tokens"
            )
    for task in dict.fromkeys(needle.task for needle in after.needles):
        for length in dict.fromkeys(needle.length for needle in after.needles):
            pair = [[n for n in one.needles if (n.task, n.length) == (task, length)] for one in (before, after)]
            if pair[1]:
                old_found, new_found = (sum(n.found for n in side) for side in pair)
                lines.append(f"    {task} at {length:>7,}: {old_found} of {sum(n.tries for n in pair[1])} found before, {new_found} after")
    return lines


def positions_csv(before: Found, after: Found) -> str:
    """Return loss by position as a table: first, last, documents, tokens, before, before in sliding windows, after."""
    places = zip(before.positions, before.sliding, after.positions, strict=True)
    rows = [[a.first, a.last, a.documents, a.tokens, *(round(place.nats, 5) for place in (b, w, a))] for b, w, a in places]
    return _csv(["first", "last", "documents", "tokens", "before", "before_sliding", "after"], rows)


def needles_csv(before: Found, after: Found) -> str:
    """Return the needles as a table: task, length, depth, tries, and what was found, and nats a token of the answer, before and after."""
    pairs = zip(before.needles, after.needles, strict=True)
    rows = [[a.task, a.length, a.depth, a.tries, b.found, a.found, round(b.nats, 4), round(a.nats, 4)] for b, a in pairs]
    return _csv(["task", "length", "depth", "tries", "found_before", "found_after", "nats_before", "nats_after"], rows)


def _csv(header: list[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()
