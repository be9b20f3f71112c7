"""``contamination``: the test items that stand in the very token shards a model was trained on."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from minifoundation.config import ContaminationOptions
from minifoundation.container import cores
from minifoundation.data import survey
from minifoundation.data.ledger import Entry
from minifoundation.data.samples import Order
from minifoundation.data.shards import Shard, Shards
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.errors import UserError, refuse_unwritable
from minifoundation.evaluate.contamination import SIZES, findings, items_of, separated
from minifoundation.evaluate.ngrams import Index, Item
from minifoundation.evaluate.requests import read_tasks
from minifoundation.evaluate.results import read_items, read_results, restored
from minifoundation.evaluate.scan import Scan
from minifoundation.evaluate.vocabulary import Vocabulary, marks_never_spelled
from minifoundation.wording import counted, short_bytes

Seen = dict[int, npt.NDArray[np.bool_]]

WORTH_A_PROCESS = 20_000_000
"""Tokens: fewer are read sooner than a process has started."""


def contamination(options: ContaminationOptions) -> None:
    """Look for the items of the tasks in the training text, print the share of each benchmark, and write ``contamination.json``."""
    shards, vocabulary, place = _text(options)
    out = options.out or place
    if out.is_dir():
        raise UserError("--out", f"{out} is a folder", f"give a file, such as {out / 'contamination.json'}")
    refuse_unwritable("--out", out, out.parent, "give another file")
    if options.data_dir is not None and not options.data_dir.is_dir():
        raise UserError("--data_dir", f"{options.data_dir}: no such folder", "give a mirror folder, or leave it out to read from the hub")
    for folder in options.evals:
        read_results(folder)  # a mistake in it should not show after the search
    items, missing = _items(options)
    if not items:
        raise UserError("contamination", f"no task has its data, the first says: {missing[0]}", "give --data_dir, or other --tasks")
    started = time.monotonic()
    indexes = [Index(items, n, vocabulary.marks) for n in SIZES]
    seen = scanned(shards, vocabulary, indexes, options.workers or cores())
    rows = findings(items, indexes, seen)
    text: dict[str, Any] = {
        "shards": [str(shard.path) for shard in shards],
        "tokens": sum(shard.n_tokens for shard in shards),
        "bytes": sum(shard.text_bytes for shard in shards),
        "seconds": round(time.monotonic() - started, 1),
    }
    from minifoundation.checkpoint import write_whole

    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, json.dumps({"sizes": SIZES, "text": text, "benchmarks": rows, "not_read": missing}, indent=1).encode())
    print(f"{text['tokens']:,} tokens ({short_bytes(text['bytes'])} of text) in {text['seconds']:,} s")
    for row in rows:
        shares = ", ".join(f"{len(row['dirty'][str(n)]) / row['items']:.2%} by {n}-grams ({row['short'][str(n)]} too short)" for n in SIZES)
        print(f"{row['benchmark']}: {counted(row['items'], 'item')}, {shares}")
    for line in missing:
        print(line)
    for folder in options.evals:
        _print_scores(folder, rows)
    print(out)


def scanned(shards: Sequence[Shard], vocabulary: Vocabulary, indexes: Sequence[Index], workers: int) -> Seen:
    """Return which n-grams of the indexes the shards have, read by at most so many processes (which import no torch)."""
    seen = {index.n: np.zeros(len(index.hashes), bool) for index in indexes}
    total = sum(shard.n_tokens for shard in shards)
    workers = min(workers, len(shards), 1 + total // WORTH_A_PROCESS)
    with tqdm(total=total, desc="contamination", unit="token", unit_scale=True, leave=False) as bar:
        if workers == 1:
            _start(vocabulary, indexes)
            results = ((shard, _read(shard)) for shard in shards)
            for shard, found in results:
                _add(seen, found)
                bar.update(shard.n_tokens)
            return seen
        with ProcessPoolExecutor(workers, get_context("spawn"), _start, (vocabulary, indexes)) as pool:
            waiting = {pool.submit(_read, shard): shard for shard in shards}
            for done in as_completed(waiting):
                _add(seen, done.result())
                bar.update(waiting[done].n_tokens)
    return seen


def _add(seen: Seen, found: Seen) -> None:
    for n, flags in found.items():
        seen[n] |= flags


_scan: Scan | None = None
"""Of a worker process, which gets its parts once."""


def _start(vocabulary: Vocabulary, indexes: Sequence[Index]) -> None:
    global _scan
    _scan = Scan(vocabulary, indexes)


def _read(shard: Shard) -> Seen:
    """Return what has been seen so far by this process, ``shard`` included."""
    assert _scan is not None
    _scan.read(shard.tokens())
    return _scan.seen


def _text(options: ContaminationOptions) -> tuple[list[Shard], Vocabulary, Path]:
    """Return the shards that were trained on, what their tokens are, and where the result goes by default."""
    if options.ckpt is not None and options.shards is not None:
        raise UserError("--shards", f"{options.shards} is given, and --ckpt {options.ckpt} too", "give one of them")
    if options.ckpt is not None:
        from minifoundation.checkpoint import load_checkpoint
        from minifoundation.commands.export_hf import native_tokenizer

        checkpoint = load_checkpoint(options.ckpt)
        with native_tokenizer(checkpoint) as tokenizer:
            vocabulary = _vocabulary(tokenizer)
        found: dict[Path, Shard] = {}
        for entry in (Entry(**kept) for kept in checkpoint.ledger):
            shards = Shards.open(Path(entry.folder))
            order = Order(shards, entry.seq_len, entry.first_shard)
            if order.sha256(entry.shards) != entry.shards_sha256:
                raise UserError(entry.folder, f"its shards are not those that {options.ckpt} has read", "give --shards and --tokenizer")
            found |= {shard.path: shard for shard in (shards.train[number] for number in order.turns[: entry.shards])}
        place = options.ckpt.parent / "contamination.json"
    elif options.shards is not None and options.tokenizer is not None:
        tokenizer = Tokenizer.load(options.tokenizer)
        opened = [Shards.open(folder) for folder in survey.folders(options.shards)]
        for one in opened:
            survey.check_tokenizer(one, tokenizer)
        vocabulary = _vocabulary(tokenizer)
        found = {shard.path: shard for shards in opened for shard in shards.train}
        place = options.shards / "contamination.json"
    elif options.shards is not None:
        raise UserError("--tokenizer", f"not given, and {options.shards} are ids", "give the tokenizer that the shards were made with")
    else:
        raise UserError("contamination", "no text to look in", "give --ckpt, or --shards with --tokenizer")
    if not found:
        raise UserError("contamination", "no training shards", "give the checkpoint of a run that has trained, or a folder of shards")
    return list(found.values()), vocabulary, place


def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    marks = marks_never_spelled(tokenizer.encode, tokenizer.surfaces)
    return Vocabulary.of(tokenizer.surfaces, breaks=(*tokenizer.prefix, tokenizer.special.eos), marks=marks)


def _items(options: ContaminationOptions) -> tuple[list[Item], list[str]]:
    """Return the items of the tasks, each benchmark once, and a line for each that cannot be read."""
    from minifoundation.evaluate import harness

    harness.quieten()
    requests = {request.row.name: request for request in read_tasks(options.tasks) if not request.row.lengths}
    manager = harness.task_manager(list(requests.values()))
    items: list[Item] = []
    missing = []
    for name, request in tqdm(requests.items(), desc="items", unit="benchmark", leave=False):
        try:
            items += items_of(name, harness.loaded_tasks(manager, request, data_dir=options.data_dir)["tasks"])
        except UserError as error:
            missing.append(f"{name} not read: {error}")
    return items, missing


def _print_scores(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    of_name = {row["benchmark"]: row for row in rows}
    for result in read_results(folder)["rows"]:
        row, items = of_name.get(result["row"]["name"]), read_items(folder, result["label"])
        if row is None or not items or not restored(result).is_share:
            continue
        for n in SIZES:
            parts = separated(items, row, n, aggregate=result["row"]["aggregate"])
            shown = [
                f"{kind} {'-' if part.score is None else f'{100 * part.score:.1f}'} ({part.n:,})"
                for kind, part in (("clean", parts.clean), ("dirty", parts.dirty))
            ]
            print(f"{result['label']} by {n}-grams: {', '.join(shown)}")
