"""What a run survives: kills, stops, damaged files, a full disk, bad numbers, and a long life.

    python -m benchmarks.crash            on a CPU: 210 SIGKILL at random moments, 60 of them inside a save, 24 SIGTERM, and the rest
    python -m benchmarks.crash --gpu      one GPU: 10 SIGKILL of a compiled run, the stall of a save at 0.5B and 1B, SIGTERM to exit at 1B
    python -m benchmarks.crash --quick    a few of each on any machine

The CPU's processes are forked from one that has everything imported, so that each life costs a second; a kill is a kill all the same.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import crash_gpu
from benchmarks.life import Life
from benchmarks.record import ROOT, finish
from minifoundation import config
from minifoundation.checkpoint import TENSORS, load_checkpoint, step_folders
from minifoundation.config import RunConfig
from minifoundation.data.batch import Batch
from minifoundation.train import loop
from minifoundation.train.resume import newest
from minifoundation.train.run import run

SETTINGS = {
    "model": {"vocab_size": 1024, "d_model": 128, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 256, "original_seq_len": 32},
    "tokenizer": {"vocab_size": 1024},
    "data": {"source": str(ROOT / "examples" / "shakespeare.txt"), "held_out": 0.05, "max_document_bytes": 1024, "shard_tokens": 65_536},
    "train": {
        "tokens": 32 * 4 * 400,
        "seq_len": 32,
        "batch_size": 2,
        "grad_accum": 2,
        "lr": 3e-3,
        "ema": 0.9,
        "eval_every": 20,
        "eval_tokens": 512,
        "save_every": 2,
        "keep": 3,
        "spike_window": 32,
    },
}
CLOCKLESS = ("step", "tokens", "loss", "z_loss", "held_out_bits_per_byte", "lr", "grad_norm", "skipped")
"""Columns of metrics.csv that do not depend on the clock or the allocator."""


def settings(work: Path, name: str, **train: Any) -> RunConfig:
    """Return the tiny run ``name`` in ``work``."""
    here = {"out_dir": str(work / name), "data": {"shards_dir": str(work / "shards")}}
    return config.build(RunConfig, config.merged(config.merged(SETTINGS, here), {"train": train}), "crash")


def struck_once(run_config: RunConfig, work: Path, kind: str, draw: random.Random) -> str:
    """Let the run go on, strike it as ``kind`` says, and return what happened: ``kill``, ``kill in a save``, ``stop`` or ``finished``."""
    life = Life(run_config, work)
    life.until(lambda: False, draw.uniform(0.0, 2.5))
    if kind == "kill in a save":
        life.until(lambda: life.saving, 10, pause=0)
        time.sleep(draw.uniform(0.0, 0.02))
    life.send(signal.SIGTERM if kind == "stop" else signal.SIGKILL)
    code = life.ended()
    if code == 0:
        return "finished" if (life.out_dir / "final.pth").exists() else "stop"
    if code in (-signal.SIGTERM, 130):
        return "stop before the run began"
    assert code == -signal.SIGKILL, f"exit code {code}: {life.said}"
    return "kill in a save" if life.saving else "kill"


def rows(run_config: RunConfig) -> list[list[str]]:
    """Return metrics.csv without what depends on the clock."""
    with (run_config.out_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [[row[name] for name in CLOCKLESS] for row in csv.DictReader(file)]


def unequal(run_config: RunConfig, whole: RunConfig) -> list[str]:
    """Return what differs between two runs that have come to their end, bit for bit."""
    a, b = (load_checkpoint(one.out_dir / "final.pth") for one in (run_config, whole))
    found = [name for name, tensor in a.tensors().items() if not torch.equal(tensor, b.tensors()[name])]
    found += [name for name in ("progress", "ledger") if getattr(a, name) != getattr(b, name)]
    # One that was told to stop has folders of its own, also of the last step, whose evaluation a stop can cut short.
    common = max({folder.name for folder in step_folders(run_config.out_dir)} & {folder.name for folder in step_folders(whole.out_dir)})
    last = [(one.out_dir / common / TENSORS).read_bytes() for one in (run_config, whole)]
    return found + ["optimizer"] * (last[0] != last[1]) + ["metrics.csv"] * (rows(run_config) != rows(whole))


def struck(work: Path, wanted: dict[str, int], draw: random.Random, **length: int) -> dict[str, Any]:
    """Strike runs until each kind has been had as often as ``wanted``, and compare each that ends with one that nothing happened to."""
    whole = settings(work, "whole", **length)
    assert run(whole, resume=None, dry_run=False)
    had = {**dict.fromkeys(wanted, 0), "stop before the run began": 0}
    differences: list[str] = []
    finished = 0

    def wanting() -> list[str]:
        """Return the kinds that are still to be had; a kill in a save is a kill too."""
        kills = had["kill"] + had["kill in a save"]
        return [kind for kind, count in wanted.items() if (kills if kind == "kill" else had[kind]) < count]

    while wanting() or finished == 0:
        one = settings(work, f"struck{finished}", **length)
        shutil.copytree(whole.out_dir / "tokenizer", one.out_dir / "tokenizer")
        while True:
            left = wanting()
            if not left:
                assert Life(one, work).ended() == 0
                break
            happened = struck_once(one, work, draw.choice(left), draw)
            if happened == "finished":
                break
            had[happened] += 1
            if step_folders(one.out_dir):
                assert newest(one.out_dir, print) == step_folders(one.out_dir)[-1], "a kill damages nothing"
        finished += 1
        differences += unequal(one, whole)
        print(f"{finished} runs finished, {had}, unequal: {differences}", file=sys.stderr, flush=True)
        shutil.rmtree(one.out_dir)
    return {**had, "runs": finished, "unequal": differences}


def damaged(work: Path, cuts: int, flips: int, draw: random.Random) -> dict[str, Any]:
    """Cut and change every file of a checkpoint, and count what is not seen."""
    whole = settings(work, "whole")
    good, bad = step_folders(whole.out_dir)[-2:]
    tried = unseen = 0
    for path in sorted(bad.iterdir()):
        content = path.read_bytes()
        places = [draw.randrange(len(content)) for _ in range(cuts + flips)]
        for number, place in enumerate(places):
            if number < cuts:
                os.truncate(path, place)
            else:
                with path.open("r+b") as file:
                    file.seek(place)
                    file.write(bytes([content[place] ^ draw.randrange(1, 256)]))
            tried += 1
            (whole.out_dir / "final.pth").rename(work / "final.aside")
            unseen += newest(whole.out_dir, lambda _line: None) != good
            (work / "final.aside").rename(whole.out_dir / "final.pth")
            path.write_bytes(content)
    return {"damages": tried, "unseen": unseen}


def lines(text: str) -> list[str]:
    """Return the errors and warnings in what a command has printed."""
    return [line[line.index(mark) :] for line in text.splitlines() for mark in ("error: ", "warning: not written") if mark in line]


def full_disk(work: Path) -> dict[str, Any]:
    """Run on a small file system that fills up, one that becomes read-only, and in a folder that vanishes."""
    found: dict[str, Any] = {}
    disk = work / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True, check=False).returncode:
        return {"not_measured": "mounting a small file system is not allowed here"}
    try:
        for name in ("full, stop", "full, continue", "read-only", "vanished"):
            fills = name.startswith("full")
            one = settings(
                work, f"disk/{name}", if_save_fails="continue" if name.endswith("continue") else "stop", keep=100 if fills else 2
            )
            shutil.copytree(work / "whole" / "tokenizer", one.out_dir / "tokenizer")
            life = Life(one, work)
            where = one.out_dir
            if not fills:
                life.until(lambda where=where: len(step_folders(where)) == 2, 60)  # type: ignore[misc]
            if name == "read-only":
                subprocess.run(["mount", "--bind", str(where), str(where)], check=True)
                command = ["mount", "-o", "remount,ro,bind", str(where)]
                while subprocess.run(command, capture_output=True, check=False).returncode:  # busy while a checkpoint is being written
                    assert life.exit_code() is None, life.said
            if name == "vanished":
                where = where.rename(disk / "elsewhere")
            code = life.ended()
            printed = (work / f"{name}.log").read_text(encoding="utf-8")
            told, last = lines(printed), newest(where, print)
            assert told, f"{name}: exit code {code}, and nothing said: {life.said}"
            found[name] = {"exit_code": code, "told": told[-1], "traceback": "Traceback" in printed, "last": last and last.name}
            if name == "read-only":
                subprocess.run(["umount", str(where)], check=True)
            shutil.rmtree(where)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
    return found


def planted(work: Path, steps: int) -> dict[str, Any]:
    """Plant bad numbers in runs, and compare the losses at their ends with those of a clean one."""
    tokens = 32 * 4 * steps
    real = loop.train_step  # type: ignore[attr-defined]

    def trained(name: str, plant: Callable[[int], float | None], *, in_text: bool = False) -> dict[str, Any]:
        one = settings(work, f"planted-{name}", tokens=tokens, save_every=20, max_skips=4, ema=None)
        shutil.copytree(work / "whole" / "tokenizer", one.out_dir / "tokenizer")

        def stepping(model: torch.nn.Module, optimizer: Any, scaler: Any, batches: list[Batch], **options: Any) -> Any:
            factor = plant(calls[0])
            calls[0] += 1
            if factor is not None and in_text:
                batches = [Batch(noise := torch.randint_like(one.tokens, 1000), noise.roll(-1, 1)) for one in batches]
                return real(model, optimizer, scaler, batches, **options)
            weight = next(model.parameters())
            before = weight.detach().clone()
            if factor is not None:
                with torch.no_grad():
                    weight.mul_(factor)
            stats = real(model, optimizer, scaler, batches, **options)
            if factor is not None:
                with torch.no_grad():
                    weight.copy_(before)
            return stats

        calls = [0]
        loop.train_step = stepping  # type: ignore
        try:
            path = run(one, resume=None, dry_run=False)
        finally:
            loop.train_step = real  # type: ignore[attr-defined]
        assert path is not None
        progress = load_checkpoint(path).progress
        losses = [float(row[2]) for row in rows(one)]
        return {
            "skipped": [entry["step"] for entry in progress["skipped"]],
            "reasons": sorted({entry["reason"] for entry in progress["skipped"]}),
            "stepped_over": progress["stepped_over"],
            "loss_of_last_20": round(math.fsum(losses[-20:]) / 20, 4),
            "held_out_bits_per_byte": round(progress["held_out_bits_per_byte"], 4),
        }

    middle = steps // 2
    return {
        "clean": trained("clean", lambda _call: None),
        "nan": trained("nan", lambda call: math.nan if call == middle else None),
        "inf": trained("inf", lambda call: math.inf if call == middle else None),
        "spike": trained("spike", lambda call: 1e3 if call == middle else None),
        "document": trained("document", lambda call: 1.0 if call == middle else None, in_text=True),
        "row": trained("row", lambda call: math.nan if middle <= call < middle + 4 else None),
    }


def soaked(work: Path, steps: int) -> dict[str, Any]:
    """Train many tiny steps with saves and evaluations, and compare memory, descriptors and step time early and late."""
    one = settings(
        work, "soak", tokens=16 * 2 * steps, seq_len=16, batch_size=2, grad_accum=1, save_every=50, eval_every=200, eval_tokens=64
    )
    one = one.replaced(model={"d_model": 32, "n_head": 2, "n_kv_head": 1, "d_ff": 64, "n_layer": 1})
    shutil.copytree(work / "whole" / "tokenizer", one.out_dir / "tokenizer")
    resident, descriptors, seconds = [], [], []
    real = loop.train_step  # type: ignore[attr-defined]

    def stepping(*arguments: Any, **options: Any) -> Any:
        began = time.process_time()
        stats = real(*arguments, **options)
        seconds.append(time.process_time() - began)
        if len(seconds) % 100 == 0:
            resident.append(int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE"))
            descriptors.append(len(list(Path("/proc/self/fd").iterdir())))
        return stats

    loop.train_step = stepping  # type: ignore[attr-defined]
    try:
        run(one, resume=None, dry_run=False)
    finally:
        loop.train_step = real  # type: ignore[attr-defined]
    tenth = max(1, len(resident) // 10)
    early, late = resident[tenth : 2 * tenth] or resident[:1], resident[-tenth:]
    first, last = seconds[len(seconds) // 10 : len(seconds) // 5], seconds[-len(seconds) // 10 :]
    return {
        "steps": steps,
        "memory_growth": round(max(late) / max(early) - 1, 5),
        "memory_mib": [round(value / 2**20, 1) for value in (max(early), max(late))],
        "descriptors": [min(descriptors), max(descriptors)],
        "step_ms": [round(1e3 * sorted(part)[len(part) // 2], 3) for part in (first, last)],
    }


def main() -> None:
    """Measure all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--kills", type=int, default=10, help="of the run on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.gpu:
        crash_gpu.measure(quick=options.quick, kills=options.kills)
        return
    quick = options.quick
    torch.set_num_threads(1)
    draw = random.Random(options.seed)
    began = time.monotonic()
    wanted = {"kill": 2, "kill in a save": 2, "stop": 1} if quick else {"kill": 210, "kill in a save": 60, "stop": 24}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        results: dict[str, Any] = {"struck": struck(work, wanted, draw, **({"tokens": 32 * 4 * 60} if quick else {}))}
        results["damaged"] = damaged(work, *((5, 5) if quick else (50, 200)), draw)
        results["disk"] = full_disk(work)
        results["planted"] = planted(work, 60 if quick else 400)
        results["soak"] = soaked(work, 200 if quick else 20_000)
    print(results, file=sys.stderr, flush=True)
    assert not results["struck"]["unequal"], results["struck"]
    assert results["damaged"]["unseen"] == 0, results["damaged"]
    figures = {
        "kills": results["struck"]["kill"] + results["struck"]["kill in a save"],
        "kills_in_a_save": results["struck"]["kill in a save"],
        "stops": results["struck"]["stop"],
        "unequal": len(results["struck"]["unequal"]),
        "damages": results["damaged"]["damages"],
        "damages_unseen": results["damaged"]["unseen"],
        "memory_growth": results["soak"]["memory_growth"],
        "seconds": round(time.monotonic() - began),
    }
    finish("crash", figures, results=results, quick=quick)


if __name__ == "__main__":
    main()
