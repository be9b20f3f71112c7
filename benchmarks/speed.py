"""Tokens/s, MFU, peak memory and a time breakdown of whole training steps, each setting in a process of its own.

    python -m benchmarks.speed                       one GPU, about five minutes: every row
    python -m benchmarks.speed --only '16x4|1B'      rows whose name matches; --list prints the names
    python -m benchmarks.speed --quick               tiny shapes on any device

A step is ``train_step`` as ``pretrain`` calls it, on random tokens: forward, backward, clipping and AdamW. Times are medians of
synchronised steps after three to warm up. A row's name has rows x micro-batches of 4,096 tokens; its losses show a step that computes
something else.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import time
from collections import defaultdict
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch

from benchmarks.record import finish
from benchmarks.training import measure, settings

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

    def changes(self) -> dict[str, Any]:
        """Return the settings that differ from those of ``config``."""
        train = ("batch_size", "grad_accum", "precision", "compile", "loss_chunk", "seq_len")
        values = self._asdict()
        return {"train": {name: values[name] for name in train}, "model": {name: values[name] for name in ("attention", "checkpointing")}}


ROWS = [
    Row("0.5B 8x1", "model_0p5b", 8, 1),
    Row("0.5B 16x4", "model_0p5b", 16, 4),
    Row("0.5B 16x4 flash4", "model_0p5b", 16, 4, attention="flash4"),
    Row("1B 8x1", "model_1b", 8, 1),
    Row("1B 8x4 flash4", "model_1b", 8, 4, attention="flash4"),
    Row("0.5B 8x1 flash4", "model_0p5b", 8, 1, attention="flash4"),
    Row("0.5B 8x1 flash", "model_0p5b", 8, 1, attention="flash"),
    Row("0.5B 8x1 fp16", "model_0p5b", 8, 1, precision="fp16"),
    Row("0.5B 8x1 full recomputation", "model_0p5b", 8, 1, checkpointing="full"),
    Row("0.5B 4x1 no compile", "model_0p5b", 4, 1, compile=False),
    Row("0.5B 2x1 fp32", "model_0p5b", 2, 1, attention="auto", precision="fp32"),
]
QUICK = [
    Row("tiny 2x1", "tiny", 2, 1, attention="auto", compile=False, loss_chunk=48, seq_len=64),
    Row("tiny 2x2 fp32", "tiny", 2, 2, attention="auto", compile=False, precision="fp32", loss_chunk=48, seq_len=64),
]

KINDS = {
    "optimizer": "multi_tensor_apply|lpnorm|norm_kernel",
    "loss": "_losses|logsumexp",
    "attention": "cudnn|fmha|flash|sdpa|attention|Flash|bwd_preprocess|bwd_postprocess",
    "gemm": "nvjet|gemm|Gemm|cutlass|xmma|GEMM|splitK",
    "embedding": "embedding|indexing|sort|Sort|segment|compute_grad",
    "swiglu": "_product|_gradients|silu|sigmoid",
    "norm": "rsqrt|fused.*_pow_",
    "rope": "cat|clone",
    "copies": "copy|Copy|Memcpy|Memset|fill|Fill",
}
"""Regular expressions of kernels' names, the first that matches counts; what torch.compile fuses goes by a part of it."""


def profile(step: Callable[[], None]) -> dict[str, Any]:
    """Return the device's milliseconds of one step by kind of kernel, and the kernels that take most with their number."""
    if not torch.cuda.is_available():
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as recorded:
        step()
        torch.cuda.synchronize()
    kinds: dict[str, float] = defaultdict(float)
    kernels: dict[str, tuple[float, int]] = {}
    for event in recorded.key_averages():
        if event.device_type.name == "CUDA" and not event.key.startswith("Optimizer.step"):  # a span around kernels, not one
            ms = event.self_device_time_total / 1e3
            kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.key)), "other")
            kinds[kind] += ms
            kernels[f"{kind}: {event.key[:90]}"] = round(ms, 2), event.count
    return {
        "ms": {kind: round(ms, 2) for kind, ms in sorted(kinds.items(), key=lambda item: -item[1])},
        "kernels": dict(sorted(kernels.items(), key=lambda item: -item[1][0])[:24]),
    }


def measured(row: Row, steps: int) -> dict[str, Any]:
    """Return the figures of ``row``."""
    return measure(settings(row.config, row.changes()), steps, profile=profile)


def _child(pipe: Connection, row: Row, steps: int) -> None:
    try:
        pipe.send(measured(row, steps))
    except Exception as error:  # a row says what failed, and the next one runs
        pipe.send({"failed": f"{type(error).__name__}: {str(error)[:600]}"})


def apart(context: Any, row: Row, steps: int, *, seconds: float) -> dict[str, Any]:
    """Return the figures of ``row``, measured in a process of its own, or what became of it."""
    mine, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, row, steps))
    process.start()
    theirs.close()
    try:
        result: dict[str, Any] = mine.recv() if mine.poll(seconds) else {"failed": f"took longer than {seconds:.0f} s"}
    except EOFError:
        result = {"failed": "the process died"}
    process.kill()
    process.join()
    return result


def main() -> None:
    """Measure every row that fits the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", default="", help="a regular expression that names must match")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=600.0, help="start no row after this long")
    options = parser.parse_args()
    rows = [row for row in (QUICK if options.quick else ROWS) if re.search(options.only, row.name)]
    if options.list:
        print("\n".join(row.name for row in rows))
        return
    began = time.monotonic()
    context = multiprocessing.get_context("forkserver")  # it imports torch once and never opens CUDA
    context.set_forkserver_preload(["torch"])
    results: list[dict[str, Any]] = []
    for row in rows:
        left = options.seconds - (time.monotonic() - began)
        if left < 25:
            print(f"not run, out of time: {row.name}", flush=True)
            continue
        figures = apart(context, row, 2 if options.quick else options.steps, seconds=min(left, SECONDS_A_ROW))
        results.append({**row._asdict(), **figures})
        profiled = figures.pop("profile", None)
        print(f"{time.monotonic() - began:6.1f} s  {row.name}: {figures}", flush=True)
        if profiled:
            print(f"          {profiled['ms']}", flush=True)
            for name, (ms, count) in profiled["kernels"].items():
                print(f"          {ms:8.2f} {count:5.0f}  {name}", flush=True)
    best = {row["name"]: row.get("tokens_per_second", row.get("failed")) for row in results}
    finish("speed", {"tokens_per_second": best}, results=results, quick=options.quick)


if __name__ == "__main__":
    main()
