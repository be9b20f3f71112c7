"""Tokens/s, MFU and peak memory of whole training steps, beside the memory that --dry_run predicts.

    python -m benchmarks.training            one GPU: 0.5B and 1B at three batch x length settings each, and the 8 GB preset
    python -m benchmarks.training --quick    tiny shapes on any device

A step is forward, backward, clipping and AdamW on random tokens; times are medians of synchronised steps after three to warm up.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.record import ROOT, finish
from minifoundation import config, runtime
from minifoundation.config import RunConfig
from minifoundation.data.batch import Batch
from minifoundation.distributed import World
from minifoundation.model.training import TrainingModel
from minifoundation.model.transformer import Transformer
from minifoundation.runtime import Machine
from minifoundation.train.metrics import model_flops_utilisation
from minifoundation.train.optimizer import adamw
from minifoundation.train.plan import plan
from minifoundation.train.step import train_step

TINY = {"d_model": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 128, "vocab_size": 512, "original_seq_len": 64}
TINY_ON_GPU = {**TINY, "d_model": 256}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("model_0p5b", {"train": {"batch_size": 8, "seq_len": 4096}}),
    ("model_0p5b", {"train": {"batch_size": 2, "seq_len": 4096}}),
    ("model_0p5b", {"train": {"batch_size": 1, "seq_len": 16384}, "model": {"rope": {"scaling": "yarn", "factor": 4}}}),
    (
        "model_0p5b",
        {"train": {"batch_size": 1, "seq_len": 16384}, "model": {"rope": {"scaling": "yarn", "factor": 4}, "checkpointing": "attention"}},
    ),
    ("model_0p5b", {"train": {"batch_size": 8, "seq_len": 4096}, "model": {"checkpointing": "full"}}),
    ("model_1b", {"train": {"batch_size": 8, "seq_len": 4096}}),
    ("model_1b", {"train": {"batch_size": 2, "seq_len": 2048}}),
    ("model_1b", {"train": {"batch_size": 1, "seq_len": 16384}, "model": {"rope": {"scaling": "yarn", "factor": 4}}}),
]
GIB = 2**30
WARM_UP = 3


def settings(name: str, changes: dict[str, Any]) -> RunConfig:
    """Return the run of configs/<name>.yaml with ``changes``, in bf16 and compiled."""
    base = {"data": {"source": "random tokens"}, "train": {"tokens": 10**12, "precision": "bf16", "compile": True}}
    values = config.read_yaml(ROOT / "configs" / f"{name}.yaml") if name != "tiny" else {"model": TINY}
    return config.build(RunConfig, config.merged(config.merged(values, base), changes), name)


def random_model(run: RunConfig, where: Machine) -> TrainingModel:
    """Return the model of ``run`` on the device, with random weights drawn there."""
    with torch.device(where.device):
        transformer = Transformer(run.model, dtype=runtime.compute_dtype(run.train.precision, where))
    transformer.to(where.device)  # the frequencies of RoPE are made on the CPU
    with torch.no_grad():
        for weight in transformer.parameters():
            _ = weight.fill_(1.0) if weight.ndim == 1 else weight.normal_(0.0, 0.02)
    if run.train.compile and runtime.can_compile(where) is None:
        transformer.compile_blocks()
    return TrainingModel(transformer, z_loss=run.train.z_loss, chunk=run.train.loss_chunk)


def measure(
    run: RunConfig, steps: int, limit_gib: float | None = None, *, profile: Callable[[Callable[[], None]], Any] | None = None
) -> dict[str, Any]:
    """Return the figures of ``steps`` training steps after three to warm up.

    Args:
        limit_gib: caps what the process may allocate.
        profile: called with one more step; what it returns is a figure too.
    """
    where = runtime.machine()
    torch._dynamo.reset()
    gc.collect()
    if where.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_per_process_memory_fraction(limit_gib * GIB / where.memory_bytes if limit_gib else 1.0)
    assert isinstance(run.train.batch_size, int)
    shape = (run.train.grad_accum, run.train.batch_size, run.train.seq_len + 1)
    planned = plan(run, 1)
    torch.manual_seed(0)
    model = random_model(run, where)
    optimizer = adamw(model, run.train)
    scaler = torch.amp.GradScaler(where.device.type, enabled=run.train.precision == "fp16")
    losses: list[float] = []

    def step() -> None:
        rows = torch.randint(run.model.vocab_size, shape, device=where.device)
        micro = [Batch(part[:, :-1], part[:, 1:]) for part in rows]
        stats = train_step(
            model, optimizer, scaler, micro, lr=1e-4, grad_clip=run.train.grad_clip, tokens=planned.tokens_per_step, world=World()
        )
        losses.append(stats.read()[0])

    seconds: list[float] = []
    for number in range(WARM_UP + steps):
        if number == WARM_UP:
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        where.synchronize()
        started = time.perf_counter()
        step()
        where.synchronize()
        seconds.append(time.perf_counter() - started)
    recompiled = torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs
    first, seconds = seconds[0], seconds[WARM_UP:]
    median = statistics.median(seconds)
    rate = planned.tokens_per_step / median
    mfu = model_flops_utilisation(rate, planned.flops_per_token, where.peak_flops, 1)
    peak = where.peak_memory_bytes() / GIB
    return {
        "kernel": model.transformer.kernel(where.device),
        "tokens_per_second": round(rate),
        "ms_per_step": round(median * 1e3, 2),
        "ms_spread": [round(min(seconds) * 1e3, 2), round(max(seconds) * 1e3, 2)],
        "mfu": mfu and round(mfu, 4),
        "first_step_seconds": round(first, 1),
        "graphs_after_warm_up": recompiled,
        "losses": [round(losses[0], 5), round(losses[-1], 5)],
        "peak_gib": round(peak, 3),
        "predicted_gib": round(planned.memory_total / GIB, 3),
        "predicted_over_measured": round(planned.memory_total / GIB / peak, 3),
        "predicted_parts_gib": {name: round(size / GIB, 3) for name, size in planned.memory.items()},
        **({"profile": profile(step)} if profile else {}),
    }


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps", type=int, default=10)
    quick, steps = (options := parser.parse_args()).quick, options.steps
    results = []
    cases: list[tuple[str, dict[str, Any], float | None]]
    if quick:
        cases = [("tiny", {"train": {"batch_size": rows, "seq_len": 64, "compile": False}}, None) for rows in (2, 4)]
    else:
        cases = [(name, changes, None) for name, changes in CASES]
        cases.append(("gpu_8gb", {"train": {"batch_size": 1, "grad_accum": 32}}, 7.2))
    for name, changes, limit in cases:
        run = settings(name, changes)
        try:
            row = measure(run, 2 if quick or run.train.grad_accum > 1 else steps, limit)
        except torch.OutOfMemoryError as error:
            row = {"out_of_memory": str(error).splitlines()[0], "predicted_gib": round(plan(run, 1).memory_total / GIB, 3)}
        rows = f"{run.train.batch_size} x {run.train.seq_len}, checkpointing {run.model.checkpointing}"
        results.append({"config": name, "rows": rows, "grad_accum": run.train.grad_accum, "limit_gib": limit, **row})
        print(results[-1], flush=True)
    ratios = [r["predicted_over_measured"] for r in results if "peak_gib" in r]
    best = {name: max((r.get("tokens_per_second", 0) for r in results if r["config"] == name), default=0) for name, *_ in cases}
    finish(
        "training",
        {"tokens_per_second": best, "memory_ratio_min": min(ratios), "memory_ratio_max": max(ratios)},
        results=results,
        quick=quick,
    )


if __name__ == "__main__":
    main()
