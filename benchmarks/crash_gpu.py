"""The part of ``benchmarks.crash`` that is about a GPU: kills of a compiled run, what a save costs, and how fast a run stops."""

from __future__ import annotations

import csv
import gc
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks import speed
from benchmarks.life import Life
from benchmarks.record import ROOT, finish
from minifoundation import config, runtime
from minifoundation.checkpoint import TENSORS, Checkpoint, Saver, load_checkpoint, step_folders
from minifoundation.config import RunConfig
from minifoundation.data.batch import Batch
from minifoundation.distributed import World
from minifoundation.runtime import Moment
from minifoundation.train.guard import Guard
from minifoundation.train.optimizer import adamw, optimizer_state
from minifoundation.train.step import StepStats, train_step
from minifoundation.train.trial import random_model

SMALL = {"vocab_size": 1024, "d_model": 256, "n_layer": 4, "n_head": 4, "n_kv_head": 2, "d_ff": 768, "original_seq_len": 256}
TINY = {"d_model": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 128, "vocab_size": 512, "original_seq_len": 64}
GIB = 2**30


def measure(*, quick: bool, kills: int) -> None:
    """Measure all of it; with ``quick`` tiny models, on any device. The kills come first: a process that has used a GPU cannot fork."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # each life compiles little, and most of that is cached
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        results: dict[str, Any] = {"kills": killed(work, kills=1 if quick else kills, quick=quick)}
        print(results, file=sys.stderr, flush=True)
        for size in ("model_0p5b", "model_1b"):
            results[size] = saves(size, work, quick=quick)
            print(size, results[size], file=sys.stderr, flush=True)
        results["stop"] = stopped(work, quick=quick)
    figures = {
        "kills": results["kills"]["kills"],
        "unequal": len(results["kills"]["unequal"]),
        **{f"stall_ms_{size}": results[size]["stall_ms"] for size in ("model_0p5b", "model_1b")},
        **{f"cost_of_a_save_every_100_steps_{size}": results[size]["cost_every_100_steps"] for size in ("model_0p5b", "model_1b")},
        "stop_seconds": results["stop"]["seconds"],
    }
    finish("crash_gpu", figures, results=results, quick=quick)


def killed(work: Path, kills: int, *, quick: bool) -> dict[str, Any]:
    """Kill a compiled run with deterministic kernels again and again, and compare it with one that nothing happened to."""
    steps, draw = 20 * (kills + 1), random.Random(0)
    values = {
        "model": {**TINY, "vocab_size": 1024} if quick else SMALL,
        "tokenizer": {"vocab_size": 1024},
        "data": {"source": str(ROOT / "examples" / "shakespeare.txt"), "shards_dir": str(work / "shards"), "held_out": 0.05},
        "train": {
            "tokens": (2 * 64 if quick else 8 * 256) * steps,
            "seq_len": 64 if quick else 256,
            "batch_size": 2 if quick else 8,
            "precision": "fp32" if quick else "bf16",
            "compile": not quick,
            "deterministic": True,
            "ema": 0.9,
            "save_every": 5,
            "eval_every": 40,
            "eval_tokens": 4096,
        },
    }
    whole, one = (config.build(RunConfig, {**values, "out_dir": str(work / name)}, "crash") for name in ("whole", "killed"))
    rates = {}
    for deterministic in (False, True):  # the first also fills the caches of the compiler
        reference = whole.replaced(train={"deterministic": deterministic})
        shutil.rmtree(reference.out_dir, ignore_errors=True)
        assert Life(reference, work).ended(600) == 0, (work / "whole.log").read_text(encoding="utf-8")[-3000:]
        rates[deterministic] = statistics.median(float(row["tokens_per_second"]) for row in _table(reference))
    shutil.copytree(whole.out_dir / "tokenizer", one.out_dir / "tokenizer")
    for number in range(kills):
        life, enough = Life(one, work), 20 * (number + 1)
        life.until(lambda enough=enough: _step(one) >= enough, 600, pause=0.001)  # type: ignore[misc]
        time.sleep(draw.uniform(0, 0.1))
        life.send(signal.SIGKILL)
        assert life.ended() == -signal.SIGKILL, (work / "killed.log").read_text(encoding="utf-8")[-3000:]
    assert Life(one, work).ended(600) == 0, (work / "killed.log").read_text(encoding="utf-8")[-3000:]
    a, b = (load_checkpoint(run.out_dir / "final.pth") for run in (whole, one))
    differing = [name for name, tensor in a.tensors().items() if not tensor.equal(b.tensors()[name])]
    last = [(step_folders(run.out_dir)[-1] / TENSORS).read_bytes() for run in (whole, one)]
    clockless = [
        [(row["step"], row["loss"], row["grad_norm"], row["held_out_bits_per_byte"]) for row in _table(run)] for run in (whole, one)
    ]
    return {
        "kills": kills,
        "unequal": differing + ["optimizer"] * (last[0] != last[1]) + ["metrics.csv"] * (clockless[0] != clockless[1]),
        "tokens_per_second": {"deterministic": round(rates[True]), "not": round(rates[False])},
    }


def _table(run_config: RunConfig) -> list[dict[str, str]]:
    with (run_config.out_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _step(run_config: RunConfig) -> int:
    try:
        rows = _table(run_config)
        return int(rows[-1]["step"]) if rows else 0
    except (OSError, ValueError, TypeError, KeyError):  # not there yet, or a row that is being written
        return 0


def saves(size: str, work: Path, *, quick: bool) -> dict[str, Any]:
    """Time training steps of 131,072 tokens without a save, with one that begins, and while one is written."""
    rows, micro = (8, 4) if size == "model_0p5b" else (4, 8)
    if quick:
        run = speed.settings(speed.Row("tiny", "tiny", 2, 2, attention="auto", compile=False, loss_chunk=48, seq_len=64))
    else:
        run = speed.settings(speed.Row(size, size, rows, micro, attention="auto"))
    assert isinstance(run.train.batch_size, int)
    where = runtime.machine()
    torch._dynamo.reset()
    gc.collect()
    if where.is_cuda:
        torch.cuda.empty_cache()
    model = random_model(run, where)
    optimizer = adamw(dict(model.transformer.named_parameters()), run.train)
    scaler = torch.amp.GradScaler(where.device.type, enabled=False)
    guard = Guard(10.0, 128, where.device)
    names: dict[torch.Tensor, str] = {weight: name for name, weight in model.transformer.named_parameters()}
    shape = (run.train.grad_accum, run.train.batch_size, run.train.seq_len + 1)
    data = torch.randint(run.model.vocab_size, shape, device=where.device)
    out_dir = work / f"saves_{size}"
    out_dir.mkdir()
    number = 0
    said: list[str] = []

    def saver(*, background: bool) -> Saver:
        return Saver(out_dir, keep=1, keep_every=None, background=background, if_fails="stop", say=said.append)

    saving = saver(background=True)

    pending: StepStats | None = None

    def step() -> None:
        nonlocal pending
        batches = [Batch(part[:, :-1], part[:, 1:]) for part in data]
        tokens = shape[0] * shape[1] * run.train.seq_len
        options: dict[str, Any] = {"lr": 1e-5, "grad_clip": 1.0, "tokens": tokens, "world": World()}
        stats = train_step(model, optimizer, scaler, batches, guard=guard, hold=saving.hold, **options)
        if pending is not None:
            pending.read()  # one step late, as the loop does
        pending = stats

    def checkpoint() -> Checkpoint:
        nonlocal number
        number += 1
        return Checkpoint(
            run,
            model.transformer.state_dict(),
            b"",
            {"step": number},
            optimizer=optimizer_state(optimizer, names),
            window=guard.state(),
        )

    def timed(count: int, *, save: bool) -> tuple[list[float], float, float]:
        """Return the device's seconds of each step, the host's in ``save``, and those from the save to its file being there."""
        host = written = 0.0
        moments = [Moment(where)]
        began = time.perf_counter()
        for index in range(count):
            if save and index == 0:
                if pending is not None:
                    pending.read()  # the loop too has the verdict on a step before it saves it
                began = time.perf_counter()
                saving.save(checkpoint())
                host = time.perf_counter() - began
            step()
            moments.append(Moment(where))
            if save and not written and saving.idle:
                written = time.perf_counter() - began
        seconds = [b.seconds_since(a) for a, b in pairwise(moments)]
        if save and not written:
            saving.finish()
            written = time.perf_counter() - began
        return seconds, host, written

    timed(3, save=False)
    plain = statistics.median(timed(4, save=False)[0])
    first = timed(2, save=True)[1]
    saving.finish()
    runs = [timed(3 if quick else 7, save=True) for _ in range(1 if quick else 4)]
    saving.finish()
    where.synchronize()
    extra = [sum(seconds) - plain * len(seconds) for seconds, _, _ in runs]
    began = time.perf_counter()
    waiting = saver(background=False)
    waiting.save(checkpoint())
    synchronous = time.perf_counter() - began
    n_bytes = (step_folders(out_dir)[-1] / TENSORS).stat().st_size
    saving.close()
    shutil.rmtree(out_dir)
    return {
        "tokens_per_step": shape[0] * shape[1] * run.train.seq_len,
        "checkpoint_gib": round(n_bytes / GIB, 3),
        "step_ms": round(1e3 * plain, 2),
        "step_with_a_save_ms": [round(1e3 * seconds[0], 2) for seconds, _, _ in runs],
        "steps_while_writing_ms": [[round(1e3 * value, 2) for value in seconds[1:]] for seconds, _, _ in runs],
        "host_in_save_ms": [round(1e3 * host, 2) for _, host, _ in runs],
        "first_save_host_seconds": round(first, 3),
        "stall_ms": round(1e3 * max(seconds[0] - plain for seconds, _, _ in runs), 2),
        "written_after_seconds": [round(written, 2) for _, _, written in runs],
        "write_gib_per_second": round(n_bytes / GIB / min(written for _, _, written in runs), 3),
        "cost_every_100_steps": round(max(extra) / (100 * plain), 5),
        "synchronous_save_seconds": round(synchronous, 2),
        "synchronous_cost_every_100_steps": round(synchronous / (100 * plain), 4),
        "said": said,
    }


def stopped(work: Path, *, quick: bool) -> dict[str, Any]:
    """Send SIGTERM to a run of 1B (a tiny one when quick), and time its exit."""
    values = config.read_yaml(ROOT / "configs" / "model_1b.yaml") if not quick else {"model": {**TINY, "vocab_size": 1024}}
    changes = {
        "out_dir": str(work / "stopped"),
        "tokenizer": {"path": str(work / "whole" / "tokenizer" / "tokenizer.model")},
        "data": {"source": str(ROOT / "examples" / "shakespeare.txt"), "shards_dir": str(work / "shards"), "held_out": 0.05},
        "train": {
            "tokens": 10**9,
            "seq_len": 64 if quick else 4096,
            "batch_size": 1 if quick else 4,
            "grad_accum": 1 if quick else 8,
            "precision": "fp32" if quick else "bf16",
            "save_every": 10**6,
        },
    }
    run = config.build(RunConfig, config.merged(values, changes), "crash")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    yaml = work / "stopped.yaml"
    yaml.write_text(config.to_yaml(run), encoding="utf-8")
    command = [sys.executable, "-m", "src.cli", "pretrain", "--config", str(yaml)]
    with (work / "stopped.log").open("wb") as log:  # not forked: this process has used the GPU by now
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    while _step(run) < 2:
        assert process.poll() is None, (work / "stopped.log").read_text(encoding="utf-8")[-3000:]
        time.sleep(0.05)
    began = time.perf_counter()
    process.send_signal(signal.SIGTERM)
    code = process.wait(120)
    seconds = time.perf_counter() - began
    (folder,) = step_folders(run.out_dir)
    n_bytes = (folder / TENSORS).stat().st_size
    return {"seconds": round(seconds, 2), "exit_code": code, "checkpoint_gib": round(n_bytes / GIB, 3)}
