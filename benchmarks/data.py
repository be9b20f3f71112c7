"""The data engine: tokenising end to end, memory, the loader, and how soon training begins.

    python -m benchmarks.data --corpus wiki/ [--tokenizer spm.model]     two processes; about ten minutes on two cores
    python -m benchmarks.data --quick

Text is repeated where the corpus is shorter than what is measured. Raw SentencePiece and `prepare` take turns on the same documents, so
that a machine that others use slows both; ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import lzma
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from benchmarks.record import ROOT, finish
from minifoundation.config import DataConfig, TokenizerConfig
from minifoundation.data.loader import Loader
from minifoundation.data.prepare import prepare_shards, tokenizer_for
from minifoundation.data.rows import all_documents
from minifoundation.data.samples import Samples
from minifoundation.data.shards import Shards
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.export.tokenizer import write_tokenizer

MB = 1_000_000
FILES = 4


def main() -> None:
    """Measure, print a row as soon as it is known, and finish with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default=str(ROOT / "examples" / "shakespeare.txt"), help="text, in any form that data.source takes")
    parser.add_argument("--tokenizer", type=Path, help="a SentencePiece .model; default: 16,384 pieces trained on 5 MB of the corpus")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    quick: bool = arguments.quick
    sizes = (1, 2) if quick else (10, 100, 400)
    rounds = 1 if quick else arguments.rounds
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        pieces = TokenizerConfig(path=arguments.tokenizer, vocab_size=1024 if quick else 16_384, sample_bytes=(1 if quick else 5) * MB)
        tokenizer = tokenizer_for(pieces, DataConfig(source=arguments.corpus), work / "tokenizer")
        texts = documents(arguments.corpus, sizes[1] * MB)
        size = sum(len(text.encode()) for text in texts)
        print(f"{size / MB:.1f} MB in {len(texts):,} documents, {tokenizer.vocab_size:,} pieces, {arguments.workers} processes", flush=True)
        corpora = {form: written(texts, form, work / form) for form in ("plain", "zst", "xz")}
        results: dict[str, Any] = {
            "mb": size / MB,
            "documents": len(texts),
            "workers": arguments.workers,
            "vocabulary": tokenizer.vocab_size,
        }
        results["stored_mb"] = {form: sum(file.stat().st_size for file in folder.iterdir()) / MB for form, folder in corpora.items()}
        results["tokenising"] = tokenising(texts, corpora, tokenizer, work, arguments.workers, rounds)
        results["a_core"] = against_datatrove(corpora["plain"], texts, tokenizer, work, (1 if quick else 10) * MB, rounds)
        results["loader"] = loading(corpora["plain"], tokenizer, work, rounds)
        results["memory"] = memory(texts, sizes, tokenizer, work, arguments.workers)
        results["start"] = start(corpora["plain"], tokenizer, work)
        finish("data", figures(results), results=results, quick=quick)


def figures(results: dict[str, Any]) -> dict[str, Any]:
    """Return what the bars are about."""
    ratios = results["tokenising"]["ratio"]
    return {
        "prepare_over_sentencepiece_plain": ratios["plain"],
        "prepare_over_sentencepiece_zst": ratios["zst"],
        "prepare_over_sentencepiece_xz": ratios["xz"],
        "prepare_over_datatrove_a_core": results["a_core"]["ratio"],
        "loader_tokens_per_second": results["loader"]["tokens_per_second"],
        "memory_mb": {row["corpus_mb"]: row["peak_mb"] for row in results["memory"]},
        "first_step_after_first_shard_seconds": results["start"]["first_step_after_first_shard_seconds"],
    }


def documents(corpus: str, size: int) -> list[str]:
    """Return ``size`` bytes of documents of the corpus, which is read again from its start where it is shorter."""
    config = DataConfig(source=corpus, max_document_bytes=65_536)
    taken: list[str] = []
    missing = size
    for text in itertools.chain.from_iterable(all_documents(corpus, config) for _ in itertools.count()):
        taken.append(text)
        missing -= len(text.encode())
        if missing <= 0:
            return taken
    raise AssertionError("the corpus does not end")


def written(texts: list[str], form: str, folder: Path) -> Path:
    """Write the documents as JSON lines in ``FILES`` files of that form and return their folder."""
    folder.mkdir(parents=True)
    for number in range(FILES):
        raw = b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts[number::FILES])
        match form:
            case "zst":
                (folder / f"{number}.jsonl.zst").write_bytes(zstandard.compress(raw, 3))
            case "xz":
                (folder / f"{number}.jsonl.xz").write_bytes(lzma.compress(raw, preset=1))
            case _:
                (folder / f"{number}.jsonl").write_bytes(raw)
    return folder


def prepared(corpus: Path, tokenizer: Tokenizer, shards_dir: Path, workers: int) -> Shards:
    """Return the shards of the whole corpus, made anew."""
    shutil.rmtree(shards_dir, ignore_errors=True)
    config = DataConfig(source=str(corpus), shards_dir=shards_dir, workers=workers)
    return prepare_shards(str(corpus), config, tokenizer, tokens=None)


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def tokenising(texts: list[str], corpora: dict[str, Path], tokenizer: Tokenizer, work: Path, workers: int, rounds: int) -> dict[str, Any]:
    """Return MB/s of raw SentencePiece with ``workers`` threads and of `prepare` with as many processes, and their ratio by form."""
    import sentencepiece

    raw = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    size = sum(len(text.encode()) for text in texts)
    took: dict[str, list[float]] = {"raw": [], **{form: [] for form in corpora}}
    for _ in range(rounds):
        took["raw"].append(
            seconds_of(
                lambda: [raw.encode(texts[at : at + 4096], out_type="numpy", num_threads=workers) for at in range(0, len(texts), 4096)]
            )
        )
        for form, corpus in corpora.items():
            took[form].append(seconds_of(lambda corpus=corpus: prepared(corpus, tokenizer, work / "made", workers)))  # type: ignore[misc]
        print("  ".join(f"{name} {size / MB / times[-1]:.1f} MB/s" for name, times in took.items()), flush=True)
    ratio = {form: round(statistics.median(r / t for r, t in zip(took["raw"], took[form], strict=True)), 3) for form in corpora}
    print("prepare over raw SentencePiece: " + ", ".join(f"{form} {value:.2f}" for form, value in ratio.items()), flush=True)
    return {"mb_per_second": {name: [round(size / MB / t, 2) for t in times] for name, times in took.items()}, "ratio": ratio}


def against_datatrove(corpus: Path, texts: list[str], tokenizer: Tokenizer, work: Path, size: int, rounds: int) -> dict[str, Any]:
    """Return MB/s of one core: `prepare` with one process, and datatrove's DocumentTokenizer with the exported tokenizer.json."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from datatrove.data import Document
    from datatrove.pipeline.tokens import DocumentTokenizer
    from datatrove.utils.logging import logger

    logger.remove()
    write_tokenizer(tokenizer, work / "exported", max_seq_len=4096)
    few: list[Document] = []
    taken = 0
    for number, text in enumerate(texts):
        if taken >= size:
            break
        few.append(Document(text=text, id=str(number)))
        taken += len(text.encode())
    whole = sum(len(text.encode()) for text in texts)
    theirs, ours = [], []
    for number in range(rounds):
        step = DocumentTokenizer(
            str(work / "datatrove" / str(number)),
            tokenizer_name_or_path=str(work / "exported" / "tokenizer.json"),
            eos_token="</s>",
            shuffle_documents=False,
        )
        theirs.append(taken / MB / seconds_of(lambda step=step: step.run(iter(few), 0, 1)))  # type: ignore[misc]
        ours.append(whole / MB / seconds_of(lambda: prepared(corpus, tokenizer, work / "made", 1)))
        print(f"one core: prepare {ours[-1]:.1f} MB/s, DocumentTokenizer {theirs[-1]:.2f} MB/s", flush=True)
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return {"prepare_mb_per_second": ours, "document_tokenizer_mb_per_second": theirs, "ratio": round(ratio, 2)}


def loading(corpus: Path, tokenizer: Tokenizer, work: Path, rounds: int) -> dict[str, Any]:
    """Return tokens/s of micro-batches of 8 rows of 4,096 tokens, sample by sample through a whole epoch."""
    shards = prepared(corpus, tokenizer, work / "made", 1)
    seq_len = 4096 if shards.train_tokens > 10 * MB else 512
    rates = []
    for seed in range(rounds):
        samples_of = Samples(shards, seq_len=seq_len, seed=seed)
        loader = Loader({"corpus": samples_of}, {"corpus": 1.0})
        samples = min(samples_of.samples_per_epoch or 0, 4096)
        took = seconds_of(lambda loader=loader, samples=samples: [loader.batch(range(at, at + 8)) for at in range(0, samples - 8, 8)])  # type: ignore[misc]
        rates.append((samples // 8) * 8 * seq_len / took)
    print(f"loader: {statistics.median(rates) / 1e6:.1f}M tokens/s", flush=True)
    return {"tokens_per_second": round(statistics.median(rates)), "rates": [round(rate) for rate in rates]}


def memory(texts: list[str], sizes: tuple[int, ...], tokenizer: Tokenizer, work: Path, workers: int) -> list[dict[str, int]]:
    """Return the peak memory of `prepare` and its processes together (proportional set size) by corpus size."""
    rows = []
    for size in sizes:
        taken, total = [], 0
        for text in itertools.cycle(texts):
            taken.append(text)
            total += len(text.encode())
            if total >= size * MB:
                break
        corpus = written(taken, "zst", work / "sized" / str(size))
        del taken
        line = [*MINIFOUNDATION, "prepare", "--data", str(corpus), "--tokenizer", str(tokenizer.path), "--data.workers", str(workers)]
        line += ["--data.shards_dir", str(work / "sized" / "shards")]
        process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            peak = max(peak, sum(map(proportional_bytes, tree(process.pid))))
            time.sleep(0.1)
        if process.returncode:
            raise SystemExit(f"prepare of {size} MB ended with {process.returncode}")
        rows.append({"corpus_mb": size, "peak_mb": round(peak / MB)})
        print(f"memory: {size} MB of text, {peak / MB:.0f} MB in all processes", flush=True)
        shutil.rmtree(work / "sized" / "shards")
    return rows


MINIFOUNDATION = [sys.executable, "-m", "src.cli"]


def tree(pid: int) -> Iterator[int]:
    """Yield a process and those below it."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            below = children.read_text().split()
        except OSError:
            continue
        for child in below:
            yield from tree(int(child))


def proportional_bytes(pid: int) -> int:
    """Return a process's memory, what it shares with others counted in part; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def start(corpus: Path, tokenizer: Tokenizer, work: Path) -> dict[str, float]:
    """Return the seconds from typing `pretrain` to the first complete shard, and from there to the first step of a small model."""
    out = work / "run"
    line = [
        *MINIFOUNDATION,
        "pretrain",
        "--data",
        str(corpus),
        "--tokenizer",
        str(tokenizer.path),
        "--tokens",
        "4_000_000",
        "--seq_len",
        "256",
    ]
    line += ["--grad_accum", "4", "--data.shard_tokens", "1_048_576", "--data.shards_dir", str(work / "shards"), "--out_dir", str(out)]
    line += ["--model.d_model", "128", "--model.n_layer", "2", "--model.n_head", "4", "--model.n_kv_head", "2", "--model.d_ff", "256"]
    line += ["--train.eval_every", "1_000_000", "--data.workers", "1"]
    shutil.rmtree(work / "shards", ignore_errors=True)
    began = time.perf_counter()
    with (work / "pretrain.log").open("w") as log:
        process = subprocess.Popen(line, cwd=ROOT, stdout=log, stderr=log)
    seen: dict[str, float] = {}
    reached = threading.Event()
    while process.poll() is None and not reached.is_set():
        if "first_shard" not in seen and any((work / "shards").glob("*/train-00000.bin")):
            seen["first_shard"] = time.perf_counter() - began
        metrics = out / "metrics.csv"
        if metrics.exists() and len(list(csv.reader(metrics.open()))) > 1:
            seen["first_step"] = time.perf_counter() - began
            reached.set()
        time.sleep(0.05)
    process.kill()
    process.wait()
    if len(seen) < 2:
        raise SystemExit("pretrain made no step:\n" + (work / "pretrain.log").read_text()[-2000:])
    after = seen["first_step"] - seen["first_shard"]
    print(f"start: first shard after {seen['first_shard']:.1f} s, first step {after:.1f} s later", flush=True)
    return {"first_shard_seconds": round(seen["first_shard"], 2), "first_step_after_first_shard_seconds": round(after, 2)}


if __name__ == "__main__":
    main()
