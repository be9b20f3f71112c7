"""Contamination: megabytes of text a second on one core, recall of planted leaks, false positives.

    python -m benchmarks.contamination --data_dir MIRROR --corpus TEXT     items of the whole paper suite
    python -m benchmarks.contamination --quick                             the bundled items in Shakespeare

Leaks are longest fields of items put into documents of the corpus: as they are; in capitals with other punctuation; with one word in ten
or in twenty replaced. An item counts when its longest field has at least 20 words. False positives are the items that the corpus without
leaks is said to hold; the first of them are kept, for a person to judge.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.record import ROOT, finish
from minifoundation.config import DataConfig, TokenizerConfig
from minifoundation.data.rows import all_documents
from minifoundation.data.tokenizer import BOS, EOS, Tokenizer, train_tokenizer
from minifoundation.errors import UserError
from minifoundation.evaluate import harness
from minifoundation.evaluate.contamination import SIZES, items_of
from minifoundation.evaluate.ngrams import Index, Item
from minifoundation.evaluate.requests import read_tasks
from minifoundation.evaluate.scan import Scan
from minifoundation.evaluate.vocabulary import Vocabulary, marks_never_spelled

KINDS = ("verbatim", "capitals and other punctuation", "1 word in 20 replaced", "1 word in 10 replaced")
LEAKS = 500
"""Of each kind."""
WORDS = 20
PASSES = 7
"""Over the corpus: the speed is that of the one in the middle."""


def items(tasks: str, data_dir: Path) -> list[Item]:
    """Return the items of every task that has its data."""
    requests = [request for request in read_tasks(tasks) if not request.row.lengths]
    manager = harness.task_manager(requests)
    found: list[Item] = []
    for name, request in {request.row.name: request for request in requests}.items():
        try:
            found += items_of(name, harness.loaded_tasks(manager, request, data_dir=data_dir)["tasks"])
        except UserError as error:
            print(error)
    return found


def leaked(text: str, kind: str, chance: random.Random) -> str:
    """Return a text as it would have leaked."""
    words = text.split()
    match kind:
        case "verbatim":
            return text
        case "capitals and other punctuation":
            return " ... ".join(word.upper().strip(",.?!") for word in words)
        case _:
            every = int(kind.split()[3])
            for start in range(0, len(words), every):
                words[chance.randrange(start, min(len(words), start + every))] = "otherwise"
            return " ".join(words)


def documents(corpus: Path, limit: int) -> Iterator[str]:
    """Yield documents of the corpus until they have ``limit`` bytes."""
    total = 0
    for text in all_documents(str(corpus), DataConfig(source=str(corpus), max_document_bytes=4096)):
        yield text
        total += len(text.encode())
        if total >= limit:
            return


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data_dir", type=Path, default=ROOT / "examples" / "benchmarks")
    parser.add_argument("--corpus", type=Path, default=ROOT / "examples" / "shakespeare.txt")
    parser.add_argument("--megabytes", type=int, default=50)
    given = parser.parse_args()
    harness.quieten()
    every = items("arc_easy,hellaswag:0,piqa" if given.quick else "paper", given.data_dir)
    texts = list(documents(given.corpus, (1 if given.quick else given.megabytes) * 10**6))
    chance = random.Random(0)
    long = [i for i, item in enumerate(every) if max((len(field.split()) for field in item.fields), default=0) >= WORDS]
    each = min(LEAKS, len(long) // len(KINDS))
    chosen = chance.sample(long, each * len(KINDS))
    planted = {kind: chosen[at * each : (at + 1) * each] for at, kind in enumerate(KINDS)}
    leaks = [
        f"{chance.choice(texts)[:500]} {leaked(max(every[i].fields, key=lambda field: len(field.split())), kind, chance)} and so on"
        for kind, numbers in planted.items()
        for i in numbers
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        sample = islice(texts, 200 if given.quick else 4000)
        train_tokenizer(chain(sample, leaks[:50]), TokenizerConfig(vocab_size=1024 if given.quick else 32_768), path)
        tokenizer = Tokenizer.load(path)
    marks = marks_never_spelled(tokenizer.encode, tokenizer.surfaces)
    vocabulary = Vocabulary.of(tokenizer.surfaces, breaks=(BOS, EOS), marks=marks)
    started = time.process_time()
    indexes = [Index(every, n, vocabulary.marks) for n in SIZES]
    index_seconds = time.process_time() - started
    clean = np.concatenate(tokenizer.encode_documents(texts)).astype(np.uint16)
    dirty = np.concatenate(tokenizer.encode_documents(leaks)).astype(np.uint16)

    scan = Scan(vocabulary, indexes)
    taken = []
    for _ in range(PASSES):
        started = time.process_time()
        scan.read(clean)
        taken.append(time.process_time() - started)
    megabytes = tokenizer.text_bytes(clean) / 1e6
    before = {index.n: index.coverage(scan.seen[index.n]) > 0 for index in indexes}
    scan = Scan(vocabulary, indexes)
    scan.read(dirty)
    recall: dict[str, Any] = {}
    for index in indexes:
        found = index.coverage(scan.seen[index.n]) > 0
        for kind, numbers in planted.items():
            recall[f"{kind}, {index.n}-grams"] = round(float(np.mean(found[numbers])), 4)
    hits = {
        str(n): [f"{every[i].label}: {max(every[i].fields, key=len)[:300]}" for i in np.flatnonzero(flags)[:20]]
        for n, flags in before.items()
    }
    figures = {
        "items": len(every),
        "megabytes": round(megabytes, 1),
        "megabytes_a_second": round(megabytes / median(taken), 1),
        "index_seconds": round(index_seconds, 1),
        "leaks_of_a_kind": each,
        "recall": recall,
        "found_without_leaks": {str(n): int(flags.sum()) for n, flags in before.items()},
    }
    finish("contamination", figures, results={"found_without_leaks": hits}, quick=given.quick)


if __name__ == "__main__":
    main()
