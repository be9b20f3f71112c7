"""Long context: speed and memory at 16k to 64k tokens, the loss of later positions after extension, and recall beyond the old length.

    python -m benchmarks.long_context speed                      one GPU: 0.5B and 1B at 16k, 32k and 64k under each kind of checkpointing
    python -m benchmarks.long_context speed --only '1B 64k'      rows whose name matches, put beside those that are kept; --list names them
    python -m benchmarks.long_context attention                  one GPU: the kernels of attention at these lengths
    python -m benchmarks.long_context quality --corpus wiki      one GPU, ten minutes: a model of 2k extended to 8k by each scaling
    python -m benchmarks.long_context recall                     any device: a small model finds what it was told, beyond the old length
    python -m benchmarks.long_context --quick                    every part, tiny, on any device

Steps are those of ``pretrain`` (``train/trial.py``) on random tokens, one row a micro-batch; times are medians after two steps to warm up.
Each part keeps its figures in docs/data/long_context.json beside those of the others.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from typing import Any, NamedTuple

from benchmarks.apart import apart, context
from benchmarks.record import ROOT, finish, machine
from minifoundation import config, runtime
from minifoundation.config import RunConfig
from minifoundation.train.kernels import milliseconds, usable_kernels
from minifoundation.train.trial import trial

PARTS = ("speed", "attention")
MODELS = {"0.5B": "model_0p5b", "1B": "model_1b"}
LENGTHS = (16_384, 32_768, 65_536)
CHECKPOINTING = ("none", "attention", "offload", "full")
BAR = {"1B": (52_000, 36_000, 22_000), "0.5B": (93_000, 63_000, 39_000)}
"""Tokens/s to reach at each length."""
SECONDS_A_ROW = 150.0
TINY = {"d_model": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 128, "vocab_size": 512, "original_seq_len": 64}


class Row(NamedTuple):
    """A setting whose steps are timed."""

    model: str
    seq_len: int
    checkpointing: str
    grad_accum: int = 1
    precision: str = "bf16"

    @property
    def name(self) -> str:
        accumulated = "" if self.grad_accum == 1 else f" x{self.grad_accum}"
        return f"{self.model} {self.seq_len // 1024}k {self.checkpointing}{accumulated}{' fp8' if self.precision == 'fp8' else ''}"

    def run(self) -> RunConfig:
        tiny = self.model == "tiny"
        values = {"model": TINY} if tiny else config.read_yaml(ROOT / "configs" / f"{MODELS[self.model]}.yaml")
        original = TINY["original_seq_len"] if tiny else 4096
        ours = {
            "model": {"checkpointing": self.checkpointing, "rope": {"scaling": "yarn", "factor": self.seq_len / original}},
            "data": {"source": "random tokens"},
            "train": {
                "tokens": 10**12,
                "seq_len": self.seq_len,
                "batch_size": 1,
                "grad_accum": self.grad_accum,
                "precision": self.precision,
                "loss_chunk": 8192,
                "compile": not tiny,
            },
        }
        return config.build(RunConfig, config.merged(values, ours), self.name)


def speed_rows(quick: bool) -> list[Row]:
    """Return the rows, those that matter most first."""
    if quick:
        return [Row("tiny", 1024, way) for way in ("none", "attention", "full")]
    best = [Row(model, length, "none") for model in MODELS for length in reversed(LENGTHS)]
    accumulated = [row._replace(grad_accum=4) for row in best]  # as longft's steps are: the optimizer takes its share once in four rows
    rest = [Row(model, length, way) for way in CHECKPOINTING[1:] for model in reversed(MODELS) for length in reversed(LENGTHS)]
    eight = [Row(model, length, "attention", precision="fp8") for model in reversed(MODELS) for length in LENGTHS[1:]]
    return [*best, *rest[:6], *accumulated, *rest[6:], *eight]


def step_figures(row: Row, steps: int) -> dict[str, Any]:
    """Return what steps of ``row`` take."""
    return trial(row.run(), runtime.machine(), steps=steps, warm_up=2).figures()


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Time the rows that match, each in a process of its own."""
    began, where = time.monotonic(), context()
    results: dict[str, Any] = {}
    for row in speed_rows(options.quick):
        left = options.seconds - (time.monotonic() - began)
        if not re.search(options.only, row.name):
            continue
        if left < 25:
            print(f"not run, out of time: {row.name}", flush=True)
            continue
        figures = apart(where, step_figures, row, 2 if options.quick else options.steps, seconds=min(left, SECONDS_A_ROW))
        results[row.name] = {**row._asdict(), **figures}
        print(f"{time.monotonic() - began:6.1f} s  {row.name}: {figures}", flush=True)
    return results


def attention(options: argparse.Namespace) -> dict[str, Any]:
    """Time forward and backward of every kernel of attention that can run, at the shapes of the models."""
    device = runtime.machine()
    found: dict[str, Any] = {}
    for row in [Row("tiny", 1024, "none")] if options.quick else [Row(model, length, "none") for model in MODELS for length in LENGTHS]:
        run = row.run()
        kernels = [kernel for kernel in usable_kernels(run, device) if kernel not in ("efficient", "math")] or ["auto"]
        times = milliseconds(kernels, run, device)
        shape = run.model
        # Two products forward and five backward (scores are made again), each 2 x T/2 x T x heads x width.
        flops = 7 * row.seq_len**2 * shape.n_head * shape.head_dim
        name = f"{row.model} {row.seq_len // 1024}k"
        found[name] = {kernel: {"ms": round(ms, 3), "tflops": round(flops / ms / 1e9, 1)} for kernel, ms in times.items()}
        print(f"{name}: {found[name]}", flush=True)
    return found


def kept(results: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of docs/data/long_context.json with ``results`` in the place of what was measured again."""
    path = ROOT / "docs" / "data" / "long_context.json"
    parts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
    for part, found in results.items():
        before = parts.get(part, {})
        parts[part] = {**before, **{name: {"measured_on": machine(), **figures} for name, figures in found.items()}}
    return parts


def summary(parts: dict[str, Any]) -> dict[str, Any]:
    """Return the figures in short."""
    figures: dict[str, Any] = {}
    if rows := parts.get("speed"):
        figures["tokens_per_second"] = {name: row.get("tokens_per_second", row.get("failed")) for name, row in rows.items()}
        figures["peak_gib"] = {name: row["peak_gib"] for name, row in rows.items() if "peak_gib" in row}
        for model, bars in BAR.items():
            for length, bar in zip(LENGTHS, bars, strict=True):
                there = [
                    row["tokens_per_second"] for row in rows.values() if row["model"] == model and row["seq_len"] == length and "mfu" in row
                ]
                if there:
                    figures[f"{model} {length // 1024}k over {bar:,}"] = round(max(there) / bar, 3)
    return figures


def main() -> None:
    """Measure the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS, help="which part; every one with --quick")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--list", action="store_true", help="print the names of speed's rows")
    parser.add_argument("--only", default="", help="a regular expression that names must match")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=900.0, help="start no row after this long")
    options = parser.parse_args()
    if options.list:
        print("\n".join(row.name for row in speed_rows(options.quick)))
        return
    if options.part is None and not options.quick:
        parser.error(f"name a part ({', '.join(PARTS)}), or give --quick")
    measure = {"speed": speed, "attention": attention}
    results = {part: measure[part](options) for part in PARTS if options.part in (None, part)}
    parts = results if options.quick else kept(results)
    finish("long_context", {"parts": list(parts), **summary(parts)}, results=parts, quick=options.quick)


if __name__ == "__main__":
    main()
