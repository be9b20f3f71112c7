"""A model of about 50M parameters on real text: what the sweeps and comparisons of curves share."""

from __future__ import annotations

import argparse
import csv
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import ROOT
from minifoundation import config
from minifoundation.config import RunConfig
from minifoundation.train.run import run

SIZE = {"vocab_size": 59_392, "d_model": 512, "n_layer": 8, "n_head": 8, "n_kv_head": 4, "d_ff": 1408, "original_seq_len": 1024}
QUICK_SIZE = {"vocab_size": 512, "d_model": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 64, "original_seq_len": 32}


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a program that trains the small model: --quick, --corpus, --tokenizer."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--corpus", type=Path, default=ROOT / "examples" / "shakespeare.txt")
    parser.add_argument("--tokenizer", type=Path)
    return parser


def settings(corpus: Path, work: Path, tokenizer: Path | None, *, quick: bool, train: dict[str, Any]) -> RunConfig:
    """Return a run of the small model (a tiny one when quick) on ``corpus``, in bf16, compiled, evaluated at its end alone."""
    values: dict[str, Any] = {
        "out_dir": str(work / "run"),
        "model": QUICK_SIZE if quick else SIZE,
        "tokenizer": {"path": str(tokenizer) if tokenizer else None, "vocab_size": 512 if quick else 59_392},
        "data": {"source": str(corpus), "shards_dir": str(work / "shards"), "held_out": 0.02},
        "train": {"seq_len": 32 if quick else 1024, "precision": "fp32" if quick else "bf16", "compile": not quick, "loss_chunk": 8192},
    }
    if quick:
        values["data"] |= {"max_document_bytes": 512, "shard_tokens": 4096, "held_out": 0.2}
    never = {"eval_every": 10**9, "save_every": 10**9, "eval_tokens": 512 if quick else 500_000}
    return config.build(RunConfig, config.merged(values, {"train": {**never, **train}}), "benchmark")


def curve(run_config: RunConfig) -> dict[str, Any]:
    """Train and return the losses of every step, the held-out bits per byte at the end and the median rate."""
    shutil.rmtree(run_config.out_dir, ignore_errors=True)
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    started = time.perf_counter()
    run(run_config, resume=None, dry_run=False)
    with (run_config.out_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    shutil.rmtree(run_config.out_dir)
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return {
        "loss": [round(float(row["loss"]), 4) for row in rows],
        "held_out_bits_per_byte": float(rows[-1]["held_out_bits_per_byte"]),
        "tokens_per_second": round(statistics.median(float(row["tokens_per_second"]) for row in rows)),
        "peak_memory_gib": float(rows[-1]["peak_memory_gib"]),
    }
