"""Runs of several processes on a CPU, by torchrun, and what they leave."""

from __future__ import annotations

import csv
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = (
    "--tokenizer.vocab_size 512 --model.d_model 32 --model.n_layer 2 --model.n_head 4 --model.n_kv_head 2 --model.d_ff 64 "
    "--model.original_seq_len 32 --seq_len 32 --lr 1e-2 --train.eval_every 5 --train.z_loss 1e-3"
)


def settings(folder: Path) -> list[str]:
    """Write a corpus to ``folder`` and return the options of a tiny run on it."""
    text = folder / "verse.txt"
    text.write_bytes((ROOT / "examples" / "shakespeare.txt").read_bytes()[:60_000])
    data = f"--data {text} --data.shards_dir {folder}/shards --data.max_document_bytes 512 --data.shard_tokens 4096 --data.held_out 0.3"
    return [*data.split(), *TINY.split()]


def torchrun(size: int, *more: str) -> list[str]:
    """Return what stands between Python and the module: torchrun of ``size`` processes on this machine; nothing for one."""
    if size == 1 and not more:
        return []
    local = ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--local_addr", "127.0.0.1"]
    return ["-m", "torch.distributed.run", "--nproc_per_node", str(size), *(more if "--rdzv_endpoint" in more else (*local, *more))]


def free_port() -> int:
    with socket.socket() as here:
        here.bind(("127.0.0.1", 0))
        return int(here.getsockname()[1])


def node(port: int, number: int, *more: str, size: int = 2) -> list[str]:
    """Return the launcher of one of two nodes of ``size`` processes each, that meet on the loopback device."""
    endpoint = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "test", "--local_addr", "127.0.0.1"]
    return torchrun(size, "--nnodes", "2", "--rdzv_conf", f"is_host={int(number == 0)}", *endpoint, *more)


def started(
    launcher: list[str], options: list[str], command: str = "pretrain", module: str = "src.cli", **more: str
) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}
    line = [sys.executable, *launcher, "-m", module, command, *options]
    return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train(launcher: list[str], options: list[str], module: str = "src.cli") -> str:
    """Train to the end and return what was printed."""
    process = started(launcher, options, module=module)
    printed, _ = process.communicate(timeout=280)
    assert process.returncode == 0, printed[-3000:]
    return printed


def losses(out_dir: Path) -> list[tuple[float, ...]]:
    """Return loss, z-loss and norm of the gradient, step by step."""
    with (out_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [tuple(float(row[name]) for name in ("loss", "z_loss", "grad_norm")) for row in csv.DictReader(file)]


def until(true: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120.0) -> None:
    """Return when something is so, while ``process`` runs."""
    deadline = time.monotonic() + seconds
    while not true():
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)


def of_rank(agent: int, rank: int) -> int:
    """Return the process id of a rank that the torchrun with process id ``agent`` has started."""
    return workers(agent)[rank]


def workers(agent: int) -> dict[int, int]:
    """Return the process ids by rank of what the torchrun with process id ``agent`` has started."""
    found = {}
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError, IndexError):
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == agent:
                variables = dict(part.partition(b"=")[::2] for part in (folder / "environ").read_bytes().split(b"\0"))
                if b"RANK" in variables:
                    found[int(variables[b"RANK"])] = int(folder.name)
    return found
