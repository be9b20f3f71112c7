"""Training on 1 to N GPUs of this machine: speed, memory, what of the communication is hidden, the same losses, a killed process.

    python -m benchmarks.scaling                  all GPUs, about six minutes, the most important rows first
    python -m benchmarks.scaling --only '1B'      rows whose name matches; --list prints the names
    python -m benchmarks.scaling --only 64k --steps 2 --keep   rows of 65,536 tokens, each read by all GPUs together, against one GPU
    python -m benchmarks.scaling --paper          from the kept rows: what 8, 64 and 512 GPUs would give, and where that comes from
    python -m benchmarks.scaling --quick          two processes and a tiny model on a CPU

Each row is ``train/trial.py`` on random tokens, started by torchrun as a user would: medians, once the GPUs are warm. The rows of one GPU
are measured on every GPU at once, each by itself: GPUs are not equally fast, and those that sum their gradients wait for the slowest in
each step. So a row's efficiency is its tokens/s by those of as many GPUs as slow as the slowest of them; ``efficiency_to_first`` is by
those of the first GPU. What the same GPUs would take for a step if they waited for each other and sent nothing is ``apart_ms``.
Where a row is read together both train on the same rows, and how far their losses are apart is told. The curve is ``pretrain`` on a small
text with ``tokens_per_step``: once on one GPU, and once on all with a process killed on the way, which torchrun starts again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from benchmarks.record import ROOT, finish, with_kept

KEPT = ROOT / "docs" / "data" / "scaling.json"
WARM_UP = 24
"""Micro-batches before the first step that counts: a GPU that was idle is 1% faster for some seconds, until its power is at the limit."""
TINY = {"d_model": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 128, "vocab_size": 512, "original_seq_len": 64}


class Row(NamedTuple):
    """One setting, measured on several numbers of GPUs."""

    model: str
    parallel: str
    grad_accum: int = 1
    precision: str = "bf16"
    reduce: str = "fp32"
    tokens_per_step: int | None = None
    batch_size: int = 8
    swiglu: str = "auto"
    seq_len: int = 4096
    together: bool = False
    """All GPUs read a row together (context parallelism)."""
    checkpointing: str = "none"
    sending: str = "as usual"
    """Of ddp; or "nothing", not even updated weights, or gradients "beside the backward", or "after the backward" all at once."""

    def name(self, gpus: int) -> str:
        """Return how the row is called on ``gpus`` GPUs."""
        parts = [self.model, f"{gpus}x", self.parallel if gpus > 1 else "alone", f"{self.batch_size} rows"]
        parts += [f"{self.tokens_per_step:,} tokens a step"] if self.tokens_per_step else []
        parts += [self.precision] if self.precision != "bf16" else []
        parts += [f"{self.reduce} gradients"] if self.reduce != "fp32" else []
        parts += [f"{self.swiglu} SwiGLU"] if self.swiglu != "auto" else []
        parts += [f"of {self.seq_len // 1024}k"] if self.seq_len != 4096 else []
        parts += [f"recomputing all but {self.checkpointing}"] if self.checkpointing != "none" else []
        parts += ["together"] if self.together else []
        parts += [f"sending {self.sending}"] if self.sending != "as usual" else []
        return " ".join(parts)

    def alone(self) -> Row:
        """Return the row of one GPU that this one is measured by."""
        return self._replace(parallel="none", reduce="fp32", together=False, sending="as usual")

    def like(self) -> str:
        """Return the name of that row."""
        return self.alone().name(1)


FIRST = [Row("0.5B", "ddp"), Row("0.5B", "fsdp"), Row("1B", "ddp"), Row("1B", "fsdp")]
THEN = [
    Row("0.5B", "ddp", tokens_per_step=2**19),
    Row("0.5B", "fsdp", tokens_per_step=2**19),
    Row("0.5B", "ddp", reduce="bf16"),
    Row("0.5B", "ddp", precision="fp8"),
    Row("1B", "ddp", reduce="bf16"),
    Row("1B", "ddp", precision="fp8"),
    Row("1B", "fsdp", reduce="bf16"),
    Row("0.5B", "fsdp", swiglu="own"),
]
SENDING = [Row("0.5B", "ddp", sending=when) for when in ("nothing", "beside the backward", "after the backward")]
LONG = [
    Row("0.5B", "ddp", batch_size=1, seq_len=2**16, together=True),
    Row("1B", "ddp", batch_size=1, seq_len=2**16, together=True),
    Row("1B", "ddp", batch_size=1, seq_len=2**17, together=True, checkpointing="attention"),
]
SMALL = [
    Row("tiny", "ddp", batch_size=2, precision="fp32"),
    Row("tiny", "fsdp", batch_size=2, tokens_per_step=512, precision="fp32"),
    Row("tiny", "ddp", batch_size=1, seq_len=1024, precision="fp32", together=True),
    Row("tiny", "ddp", batch_size=2, precision="fp32", sending="nothing"),
    Row("tiny", "ddp", batch_size=2, precision="fp32", sending="after the backward"),
]
CONFIGS = {"0.5B": "model_0p5b", "1B": "model_1b"}


def settings(row: Row, gpus: int) -> dict[str, Any]:
    """Return the settings of ``row`` on ``gpus`` GPUs as YAML has them."""
    from minifoundation import config

    base = {"model": TINY} if row.model == "tiny" else config.read_yaml(ROOT / "configs" / f"{CONFIGS[row.model]}.yaml")
    original = TINY["original_seq_len"] if row.model == "tiny" else 4096
    seq_len = original if row.seq_len == 4096 else row.seq_len
    train: dict[str, Any] = {
        "tokens": 10**12,
        "batch_size": row.batch_size,
        "grad_accum": row.grad_accum,
        "tokens_per_step": row.tokens_per_step,
        "precision": row.precision,
        "parallel": row.parallel,
        "reduce_precision": row.reduce,
        "seq_len": seq_len,
        "context_parallel": gpus if row.together else 1,
        "compile": row.model != "tiny",
    }
    model: dict[str, Any] = {"swiglu": row.swiglu, "checkpointing": row.checkpointing}
    if seq_len > original:
        model["rope"] = {"scaling": "yarn", "factor": seq_len / original}
    return config.merged(base, {"data": {"source": "random tokens"}, "train": train, "model": model})


def work(rows: list[Row], steps: int) -> None:
    """Measure ``rows``, in one of the processes that torchrun has started; the first one prints each as a line of JSON.

    Rows of one GPU are measured by each process for itself, at the same time.
    """
    from minifoundation import config, runtime
    from minifoundation.config import RunConfig
    from minifoundation.distributed import World, join, sharing_rows
    from minifoundation.train.meeting import bus_bandwidth, product_seconds
    from minifoundation.train.parallel import accumulated, chosen_split
    from minifoundation.train.trial import trial

    with join() as world:
        machine = runtime.machine(world.local_rank)
        told: dict[str, Any] = {"gpus": world.size, "device": machine.name}
        if world.size > 1 and rows[0].parallel != "none":
            told |= {"name": f"network {world.size}x", "bus_gb_per_second": round(bus_bandwidth(machine, world) / 1e9, 1)}
            told["nccl"] = {name: value for name, value in os.environ.items() if "NCCL_" in name}
            if machine.is_cuda:  # a slower GPU is waited for in every step
                told["product_ms_of_each"] = [round(1e3 * seconds, 3) for seconds in world.of_all(product_seconds(machine))]
            _print(told, first=world.is_first)
        for row in rows:
            together = row.parallel != "none"
            gpus = world.size if together else 1
            run = config.build(RunConfig, settings(row, gpus), row.name(gpus))
            ours = sharing_rows(world, run.train.context_parallel) if together else World()
            run = accumulated(run, ours)
            split = chosen_split(run, machine, ours)
            warm_up = max(2, round(WARM_UP / run.train.grad_accum)) if machine.is_cuda and row.seq_len == 4096 else 2
            world.wait()
            began = time.monotonic()
            found: dict[str, Any]
            ms: list[float] = []
            try:
                with sending(row.sending):
                    tried = trial(run, machine, steps=steps, warm_up=warm_up, profiled=True, world=ours, split=split)
                found, ms = tried.figures(), [round(1e3 * seconds, 2) for seconds in tried.seconds]
            except torch.OutOfMemoryError as error:  # of all GPUs alike: they hold the same
                found = {"failed": str(error).splitlines()[0]}
            machine.forget()
            peaks, ms_of_each = world.of_all(found.get("peak_gib")), world.of_all(ms)
            found = {"name": row.name(gpus), "device": machine.name, "gpus": gpus, "like": row.like(), **row._asdict(), **found}
            found |= {"peak_gib_of_each": peaks, "measuring_seconds": round(time.monotonic() - began, 1)}
            found |= {} if together else {"ms_of_each": ms_of_each}
            _print(found, first=world.is_first)
            torch.compiler.reset()


@contextmanager
def sending(when: str) -> Iterator[None]:
    """Have the processes send gradients as a row asks, and weights not at all where it asks for nothing."""
    from minifoundation.distributed import Replica

    begin = Replica.__init__

    def beside(self: Replica, module: torch.nn.Module, *others: Any, **settings: Any) -> None:
        begin(self, module, *others, **{**settings, "units": module.transformer.blocks})  # type: ignore[union-attr]

    def after(self: Replica, *others: Any, **settings: Any) -> None:
        begin(self, *others, **{**settings, "units": ()})

    def nothing(*_: Any) -> None:
        pass

    ways: dict[str, dict[str, Any]] = {
        "as usual": {"__init__": begin},
        "nothing": {"_send": nothing, "share_weights": nothing},
        "beside the backward": {"__init__": beside},
        "after the backward": {"__init__": after},
    }
    with patch.multiple(Replica, **ways[when]):
        yield


def _print(found: dict[str, Any], *, first: bool) -> None:
    if first:
        print("ROW " + json.dumps(found), flush=True)


def torchrun(gpus: int, *command: str, restarts: int = 0) -> list[str]:
    """Return the command that starts ``command`` (a module and its options) on ``gpus`` processes of this machine."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(gpus), "--max_restarts", str(restarts)]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--local_addr", "127.0.0.1"]
    return [sys.executable, *(launch if gpus > 1 else []), "-m", *command]


def measured(gpus: int, rows: list[Row], steps: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Give the figures of ``rows`` on ``gpus`` GPUs, each as it is known, and stop after ``seconds``."""
    given = json.dumps([row._asdict() for row in rows])
    command = torchrun(gpus, "benchmarks.scaling", "--work", given, "--steps", str(steps))
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "PYTHONUNBUFFERED": "1"}
    deadline = time.monotonic() + seconds
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, start_new_session=True)
        try:
            read, failed = 0, ""
            while not failed:
                ended = process.poll() is not None  # before reading: what was said until then is read
                text = os.pread(said.fileno(), 2**20, read).decode()
                lines = text[: text.rfind("\n") + 1]
                read += len(lines.encode())
                for line in lines.splitlines():
                    if line.startswith("ROW "):
                        yield json.loads(line[4:])
                    else:
                        print(line, flush=True)
                if ended and process.returncode == 0:
                    return
                if ended:
                    failed = f"exit code {process.returncode}"
                elif time.monotonic() > deadline:
                    failed = f"out of time after {seconds:.0f} s"
                time.sleep(0.1)
            yield {"name": f"{gpus}x", "gpus": gpus, "failed": failed}
        finally:
            _end(process)


def _end(process: subprocess.Popen[Any]) -> None:
    """End torchrun and what it has started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(40)  # it gives the processes half a minute
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def summary(row: dict[str, Any], known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what of a row is printed, with its efficiency where that of one GPU is known."""
    if "tokens_per_second" not in row:
        return {name: value for name, value in row.items() if name in ("failed", "bus_gb_per_second", "product_ms_of_each")}
    alone, gpus = known.get(row["like"]), row["gpus"]
    profile = row.get("profile", {})
    sent = profile.get("ms", {}).get("communication", 0.0)
    found: dict[str, Any] = {
        "tokens_per_second_per_gpu": round(row["tokens_per_second"] / gpus),
        "ms_per_step": row["ms_per_step"],
        "mfu": row["mfu"],
        "peak_gib": row["peak_gib"],
        "predicted_gib": row["predicted_gib"],
    }
    if gpus > 1:
        found["communication_ms"] = sent
        found["communication_hidden"] = round(profile.get("hidden_communication_ms", 0.0) / sent, 3) if sent else None
        if alone and "tokens_per_second" in alone:
            slowest, row["apart_ms"] = apart(alone, gpus)
            found["efficiency"] = row["efficiency"] = round(row["tokens_per_second"] / gpus / slowest, 4)
            row["efficiency_to_first"] = round(row["tokens_per_second"] / gpus / alone["tokens_per_second"], 4)
            found |= {name: row[name] for name in ("efficiency_to_first", "apart_ms")}
            if row["together"]:
                found["losses"], found["losses_of_one_gpu"] = row["losses"], alone["losses"]
                differences = [abs(a - b) for a, b in zip(row["losses"], alone["losses"], strict=True)]
                found["largest_difference_of_losses"] = row["largest_difference_of_losses"] = max(differences)
    return found


def apart(alone: dict[str, Any], gpus: int) -> tuple[float, float]:
    """Return what the slowest of the first ``gpus`` GPUs does alone, tokens/s, and the milliseconds of a step if each waited for all."""
    of_each = alone.get("ms_of_each", [[alone["ms_per_step"]]])[:gpus]
    tokens = alone["tokens_per_second"] * alone["ms_per_step"]
    steps = [max(at_once) for at_once in zip(*of_each, strict=True)]
    return tokens / max(statistics.median(ms) for ms in of_each), round(statistics.median(steps), 2)


def curves(gpus: int, folder: Path, seconds: float, *, quick: bool) -> dict[str, Any]:
    """Return how far the losses of one GPU and of all are apart, at equal tokens a step, and how long a killed process holds all up.

    The two runs go on at the same time: the model is small, and what they take is mostly their start.
    """
    on_gpu = torch.cuda.is_available()
    sizes = {**TINY, "d_model": 512, "n_layer": 4, "n_head": 8, "n_kv_head": 4, "d_ff": 1408, "original_seq_len": 1024} if on_gpu else TINY
    seq_len, rows, steps, save_every = (1024, 8, 200, 20) if on_gpu else (64, 2, 20 if quick else 40, 5)
    per_step = seq_len * rows * gpus
    options = [
        *(f"--model.{name}={value}" for name, value in sizes.items() if name != "vocab_size"),
        *(["--amp", "--bf16", "--model.attention", "flash"] if on_gpu else []),
        *f"--data {ROOT}/examples/shakespeare.txt --data.shards_dir {folder}/shards --tokenizer.vocab_size 512".split(),
        *f"--data.max_document_bytes 65536 --data.held_out 0.02 --seq_len {seq_len} --batch_size {rows}".split(),
        *f"--train.tokens_per_step {per_step} --tokens {per_step * steps} --train.eval_every 1000 --lr 3e-4".split(),
        *["--resume", "auto", "--train.ema", "0.99", "--train.save_every", str(save_every)],
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    deadline = time.monotonic() + seconds
    name = {"name": f"curve {gpus}x", "gpus": gpus}
    prepared = [sys.executable, "-m", "src.cli", "pretrain", *options, "--tokens", str(per_step), "--out_dir", f"{folder}/first"]
    if not on_gpu:  # shards and tokenizer first: on two cores the runs would wait for each other
        subprocess.run(prepared, cwd=ROOT, env=environment, capture_output=True, timeout=seconds, check=True)
    runs: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for run, launcher in (("one", torchrun(1, "src.cli")), ("all", torchrun(gpus, "src.cli", restarts=1))):
            command = [*launcher, "pretrain", *options, "--out_dir", str(folder / run)]
            with (folder / f"{run}.log").open("wb") as log:
                runs[run] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        whole, out_dir = runs["all"], folder / "all"
        _until(lambda: len(_losses(out_dir)) >= 10 and any(out_dir.glob("step_*/manifest.json")), whole, deadline)
        os.kill(worker(whole.pid, gpus - 1), signal.SIGKILL)
        killed = time.monotonic()
        _until(lambda: len(_starts(out_dir)) == 2, whole, deadline)
        again = _starts(out_dir)[1]["step"]
        _until(lambda: len(_losses(out_dir)) > again, whole, deadline)
        restart = time.monotonic() - killed
        for process in runs.values():
            process.wait(max(1.0, deadline - time.monotonic()))
            if process.returncode:
                raise TimeoutError(f"exit code {process.returncode}")
    except (TimeoutError, subprocess.TimeoutExpired) as error:
        return {**name, "failed": str(error)[:200], "log": {run: faults(folder / f"{run}.log") for run in runs}}
    finally:
        for process in runs.values():
            _end(process)
    both = list(zip(_losses(folder / "one"), _losses(folder / "all"), strict=True))
    return {
        **name,
        "tokens_per_step": per_step,
        "steps": len(both),
        "first_and_last_loss": [both[0][0], both[-1][0]],
        "largest_difference_of_losses": max(abs(a - b) for a, b in both),
        "mean_difference_of_losses": sum(abs(a - b) for a, b in both) / len(both),
        "went_on_at_step": again,
        "seconds_from_kill_to_next_step": round(restart, 1),
    }


def faults(log: Path) -> list[str]:
    """Return the lines of a log that say what went wrong, not torchrun's own report, or else its last ones."""
    lines = [line[:300] for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if re.search(r"^\[rank|^error|^warning|^Traceback|Error", line) and "elastic" not in line]
    return (told or lines)[-40:]


def _until(true: Any, process: subprocess.Popen[bytes], deadline: float) -> None:
    while not true():
        if time.monotonic() > deadline or process.poll() is not None:
            raise TimeoutError(f"exit code {process.poll()}")
        time.sleep(0.05)


def _losses(out_dir: Path) -> list[float]:
    path = out_dir / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row.get("loss")]


def _starts(out_dir: Path) -> list[dict[str, Any]]:
    path = out_dir / "run.json"
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["starts"])
    except (OSError, ValueError):
        return []


def worker(agent: int, rank: int) -> int:
    """Return the process id of a rank that the torchrun ``agent`` has started."""
    for folder in Path("/proc").iterdir():
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == agent and f"RANK={rank}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                return int(folder.name)
        except (OSError, ValueError, IndexError):
            continue
    raise TimeoutError(f"rank {rank} of {agent} is not there")


def paper(
    *,
    parameters: int,
    head: int,
    seconds: float,
    optimizer: float,
    gpus: int,
    node: int,
    parallel: str,
    links: float,
    network: float,
) -> dict[str, float]:
    """Return what a step on ``gpus`` GPUs would take, on paper.

    A ring sends (n - 1) / n of what is gathered or scattered, twice that of what is summed everywhere.

    ddp scatters gradients, 4 bytes a parameter, to the owners within a machine, sums there what each owns over the machines, and gathers
    copies of weights, 2 bytes, of the embedding 4. What goes by the links of a machine costs its own time, beside the backward or after
    it. What goes over machines has the backward to go beside, two thirds of the step, except for the embedding's, known last. fsdp gathers
    weights in 2 bytes for the forward and again for the backward, and scatters gradients; the first gather, of the embedding, has nothing
    beside it.

    Args:
        head: weights of the embedding, a tied head with it.
        seconds: of the step on one GPU.
        optimizer: seconds of it that each GPU has only its part of.
        node: GPUs of a machine.
        links: bytes/s that a GPU sends at within it.
        network: and to other machines.
    """
    owners = min(gpus, node) if parallel == "ddp" else gpus
    machines, near = -(-gpus // node), (owners - 1) / owners
    alone = seconds - optimizer * near
    if parallel == "ddp":
        across = 2 * (machines - 1) / machines * 4 * parameters / owners / network
        gradients, gathers = near * 4 * parameters / links, near * (2 * (parameters - head) + 4 * head) / links
        last = across * head / parameters
        waited = gradients + gathers + last
        late = max(0.0, across - last - seconds * 2 / 3)
        gradients += across
    else:
        rate = links if machines == 1 else min(network, links)
        gradients, gathers = near * 4 * parameters / rate, 2 * near * 2 * parameters / rate
        last, first = gradients * head / parameters, gathers / 2 * head / parameters
        waited = last + first
        late = max(0.0, gradients - last + gathers / 2 - seconds * 2 / 3) + max(0.0, gathers / 2 - first - seconds / 3)
    total = alone + waited + late
    return {"communication_seconds": gradients + gathers, "seconds": total, "efficiency": seconds / total}


def on_paper(results: list[dict[str, Any]], node: int, network: float) -> list[dict[str, Any]]:
    """Return rows of the model on paper: those that were measured, and more GPUs up to 512.

    What the measured step took more than on paper (one GPU waits for the other, kernels of the network share processors with products,
    fsdp copies) is added to all.

    Args:
        node: GPUs that share the machine's own links; more go by the network.
        network: bytes/s of a GPU to other machines, an assumption.
    """
    from minifoundation import config
    from minifoundation.config import RunConfig
    from minifoundation.model.size import n_parameters

    known = {row["name"]: row for row in results}
    rates = {row["gpus"]: 1e9 * row["bus_gb_per_second"] for row in results if "bus_gb_per_second" in row}
    found: list[dict[str, Any]] = []
    for row in results:
        alone = known.get(row.get("like", ""))
        if row["gpus"] == 1 or alone is None or "ms_per_step" not in alone or "ms_per_step" not in row or row["model"] not in CONFIGS:
            continue
        if row["tokens_per_step"] or row["precision"] != "bf16" or row["reduce"] != "fp32" or "SwiGLU" in row["name"]:
            continue
        if row.get("seq_len", 4096) != 4096 or row.get("sending", "as usual") != "as usual":
            continue
        model = config.build(RunConfig, settings(Row(row["model"], row["parallel"]), 1), "paper").model
        slowest, _ = apart(alone, row["gpus"])
        seconds = alone["tokens_per_second"] * alone["ms_per_step"] / 1e3 / slowest
        more = 0.0
        for gpus in (row["gpus"], *(size for size in (4, 8, 64, 512) if size > row["gpus"])):
            told = paper(
                parameters=n_parameters(model),
                head=model.vocab_size * model.d_model,
                seconds=seconds,
                optimizer=alone["profile"]["ms"]["optimizer"] / 1e3,
                gpus=gpus,
                node=node,
                parallel=row["parallel"],
                links=rates[row["gpus"]],
                network=network,
            )
            if gpus == row["gpus"]:
                more = row["ms_per_step"] / 1e3 - told["seconds"]
            efficiency = seconds / (told["seconds"] + more)
            figures = {"model": row["model"], "parallel": row["parallel"], "gpus": gpus}
            figures |= {name: round(value, 4) for name, value in told.items()}
            figures |= {"measured_more_seconds": round(more, 4), "efficiency_with_that": round(efficiency, 4)}
            figures["tokens_per_second"] = round(gpus * slowest * efficiency)
            found.append(figures)
    return found


def main() -> None:
    """Measure every row that fits the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", default="", help="a regular expression that names must match; 'curve' is one")
    parser.add_argument("--keep", action="store_true", help="keep the rows of docs/data/scaling.json that are not measured again")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--gpus", type=int, default=0, help="the most to take; default: all, and two processes on a CPU")
    parser.add_argument("--seconds", type=float, default=540.0, help="start nothing after this long")
    parser.add_argument("--paper", action="store_true", help="print the model on paper of the kept rows, and measure nothing")
    parser.add_argument("--node", type=int, default=8, help="of --paper: GPUs of a machine")
    parser.add_argument(
        "--network", type=float, default=50e9, help="of --paper: bytes/s a GPU sends to other machines (50e9: 400 Gbit/s each)"
    )
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work([Row(**row) for row in json.loads(options.work)], options.steps)
        return
    if options.paper:
        for row in on_paper(json.loads(KEPT.read_text(encoding="utf-8"))["results"], options.node, options.network):
            print(json.dumps(row))
        return
    began = time.monotonic()
    on_gpu = torch.cuda.is_available()
    most = options.gpus or (torch.cuda.device_count() if on_gpu else 2)
    sizes = [size for size in (1, 2, 4, 8) if size <= most]
    quick = options.quick or not on_gpu
    stages = [SMALL] if quick else [FIRST, THEN, SENDING, LONG]
    plan: list[tuple[int, list[Row]]] = []
    for rows in stages:
        for size in sizes:
            these = list(dict.fromkeys(row.alone() for row in rows)) if size == 1 else rows
            planned = {row.name(n) for n, earlier in plan for row in earlier}
            plan.append((size, [row for row in these if row.name(size) not in planned and re.search(options.only, row.name(size))]))
    if options.list:
        print("\n".join(row.name(size) for size, rows in plan for row in rows), f"curve {most}x", sep="\n")
        return
    results: list[dict[str, Any]] = []
    kept = json.loads(KEPT.read_text(encoding="utf-8"))["results"] if options.keep else []
    known: dict[str, dict[str, Any]] = {row["name"]: row for row in kept}
    steps = 2 if quick else options.steps
    for number, (size, rows) in enumerate(plan):
        if number == len(sizes) and most > 1 and re.search(options.only, f"curve {most}x"):
            _curve(results, most, began, options.seconds, quick=False)
        left = options.seconds - (time.monotonic() - began)
        if rows and left < 25:
            print(f"not run: {[row.name(size) for row in rows]}", flush=True)
        if not rows or left < 25:
            continue
        for row in measured(most if size == 1 else size, rows, steps, left):
            results.append(row)
            known[row["name"]] = row
            print(f"{time.monotonic() - began:6.1f} s  {row['name']}: {summary(row, known)}", flush=True)
    if len(plan) == len(sizes) and most > 1 and re.search(options.only, f"curve {most}x"):
        _curve(results, most, began, options.seconds, quick=quick)
    if options.keep:
        results = with_kept("scaling", [row for row in results if "failed" not in row], alike=["name"])
    figures = {
        "tokens_per_second": {row["name"]: row.get("tokens_per_second", row.get("failed")) for row in results if "model" in row},
        "efficiency": {row["name"]: row["efficiency"] for row in results if "efficiency" in row},
        **{row["name"]: {name: value for name, value in row.items() if name != "name"} for row in results if "model" not in row},
    }
    finish("scaling", figures, results=results, quick=options.quick)


def _curve(results: list[dict[str, Any]], gpus: int, began: float, seconds: float, *, quick: bool) -> None:
    left = seconds - (time.monotonic() - began)
    if left < 30:
        print(f"not run: curve {gpus}x", flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = curves(gpus, Path(folder), left, quick=quick)
        except subprocess.TimeoutExpired:
            found = {"name": f"curve {gpus}x", "gpus": gpus, "failed": f"out of time after {left:.0f} s"}
    results.append(found)
    print(f"{time.monotonic() - began:6.1f} s  {found}", flush=True)


if __name__ == "__main__":
    main()
