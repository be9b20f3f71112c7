"""Tokens/s, MFU, peak memory and a time breakdown of whole training steps, each setting in a process of its own.

    python -m benchmarks.speed                       one GPU, about five minutes: every row
    python -m benchmarks.speed --only '16x4|1B'      rows whose name matches; --list prints the names
    python -m benchmarks.speed --only memory --keep  predicted and measured peaks, put beside the rows that are kept already
    python -m benchmarks.speed --quick               tiny shapes on any device

A step is ``train_step`` as ``pretrain`` calls it, on random tokens: forward, backward, clipping and AdamW (``train/trial.py``, which
``bench`` and ``--batch_size auto`` use too). Times are medians after three steps to warm up. A row's name has rows x micro-batches of 4,096
tokens; its losses show a step that computes something else.
"""

from __future__ import annotations

import argparse
import re
import time
from typing import Any, NamedTuple

import torch

from benchmarks.apart import apart, context
from benchmarks.record import ROOT, finish, with_kept
from minifoundation import config, runtime
from minifoundation.config import RunConfig
from minifoundation.train.trial import trial

SECONDS_A_ROW = 100.0


class Row(NamedTuple):
    """A setting of the ordinary path."""

    name: str
    config: str
    batch_size: int
    grad_accum: int
    attention: str = "cudnn"
    precision: str = "bf16"
    compile: bool = True
    checkpointing: str = "none"
    loss_chunk: int = 8192
    seq_len: int = 4096
    optimizer_states: str = "fp32"
    limit_gib: float | None = None
    """What the process may allocate at most."""
    profiled: bool = True

    def changes(self) -> dict[str, Any]:
        """Return the settings that differ from those of ``config``."""
        train = ("batch_size", "grad_accum", "precision", "compile", "loss_chunk", "seq_len", "optimizer_states")
        values = self._asdict()
        model: dict[str, Any] = {name: values[name] for name in ("attention", "checkpointing")}
        if self.seq_len > 4096:
            model["rope"] = {"scaling": "yarn", "factor": self.seq_len / 4096}
        return {"train": {name: values[name] for name in train}, "model": model}


ROWS = [
    Row("0.5B 8x1", "model_0p5b", 8, 1),
    Row("0.5B 16x4", "model_0p5b", 16, 4),
    Row("0.5B 16x4 flash4", "model_0p5b", 16, 4, attention="flash4"),
    Row("1B 8x1", "model_1b", 8, 1),
    Row("1B 8x4 flash4", "model_1b", 8, 4, attention="flash4"),
    Row("0.5B 8x1 flash4", "model_0p5b", 8, 1, attention="flash4"),
    Row("0.5B 8x1 flash", "model_0p5b", 8, 1, attention="flash"),
    Row("0.5B 8x1 fp16", "model_0p5b", 8, 1, precision="fp16"),
    Row("0.5B 4x1 no compile", "model_0p5b", 4, 1, compile=False),
    Row("0.5B 2x1 fp32", "model_0p5b", 2, 1, attention="auto", precision="fp32"),
    # What the prediction of memory is held to: rows, length, recomputation, accumulation, a small card.
    Row("memory 0.5B 2x1", "model_0p5b", 2, 1, profiled=False),
    Row("memory 0.5B 8x2", "model_0p5b", 8, 2, profiled=False),
    Row("memory 0.5B 8x1 attention", "model_0p5b", 8, 1, checkpointing="attention", profiled=False),
    Row("memory 0.5B 8x1 full", "model_0p5b", 8, 1, checkpointing="full", profiled=False),
    Row("memory 0.5B 1x1 16k", "model_0p5b", 1, 1, seq_len=16_384, profiled=False),
    Row("memory 0.5B 1x1 16k attention", "model_0p5b", 1, 1, seq_len=16_384, checkpointing="attention", profiled=False),
    Row("memory 0.5B 1x1 64k attention", "model_0p5b", 1, 1, seq_len=65_536, checkpointing="attention", profiled=False),
    Row("memory 1B 8x2", "model_1b", 8, 2, profiled=False),
    Row("memory 1B 1x1 16k", "model_1b", 1, 1, seq_len=16_384, profiled=False),
    Row(
        "memory 0.5B 1x32 8 GB card",
        "gpu_8gb",
        1,
        32,
        checkpointing="full",
        loss_chunk=512,
        optimizer_states="int8",
        limit_gib=7.2,
        profiled=False,
    ),
]
TINY = {"d_model": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 128, "vocab_size": 512, "original_seq_len": 64}
QUICK = [
    Row("tiny 2x1", "tiny", 2, 1, attention="auto", compile=False, loss_chunk=48, seq_len=64),
    Row("tiny 2x2 fp32", "tiny", 2, 2, attention="auto", compile=False, precision="fp32", loss_chunk=48, seq_len=64),
]


def settings(row: Row) -> RunConfig:
    """Return the run of ``row``."""
    base = {"data": {"source": "random tokens"}, "train": {"tokens": 10**12}}
    values = config.read_yaml(ROOT / "configs" / f"{row.config}.yaml") if row.config != "tiny" else {"model": TINY}
    return config.build(RunConfig, config.merged(config.merged(values, base), row.changes()), row.name)


def measured(row: Row, steps: int) -> dict[str, Any]:
    """Return the figures of ``row``."""
    machine, run = runtime.machine(), settings(row)
    if row.limit_gib is not None and machine.is_cuda:
        torch.cuda.set_per_process_memory_fraction(row.limit_gib * 2**30 / machine.memory_bytes)
    return trial(run, machine, steps=steps, profiled=row.profiled).figures()


def main() -> None:
    """Measure every row that fits the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", default="", help="a regular expression that names must match")
    parser.add_argument("--keep", action="store_true", help="keep the rows of docs/data/speed.json that are not measured again")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=600.0, help="start no row after this long")
    options = parser.parse_args()
    rows = [row for row in (QUICK if options.quick else ROWS) if re.search(options.only, row.name)]
    if options.list:
        print("\n".join(row.name for row in rows))
        return
    began = time.monotonic()
    where = context()
    results: list[dict[str, Any]] = []
    for row in rows:
        left = options.seconds - (time.monotonic() - began)
        if left < 25:
            print(f"not run, out of time: {row.name}", flush=True)
            continue
        figures = apart(where, measured, row, 2 if options.quick else options.steps, seconds=min(left, SECONDS_A_ROW))
        results.append({**row._asdict(), **figures})
        profiled = figures.pop("profile", None)
        print(f"{time.monotonic() - began:6.1f} s  {row.name}: {figures}", flush=True)
        if profiled:
            print(f"          {profiled['ms']}", flush=True)
            for name, (ms, count) in profiled["kernels"].items():
                print(f"          {ms:8.2f} {count:5.0f}  {name}", flush=True)
    if options.keep:
        results = with_kept("speed", results, alike=["name"])
    best = {row["name"]: row.get("tokens_per_second", row.get("failed")) for row in results}
    finish("speed", {"tokens_per_second": best}, results=results, quick=options.quick)


if __name__ == "__main__":
    main()
