"""Two processes compute what one computes."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minifoundation.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[1]


def settings(folder: Path) -> list[str]:
    """Write a corpus to ``folder`` and return the options of a tiny run on it."""
    text = folder / "verse.txt"
    text.write_bytes((ROOT / "examples" / "shakespeare.txt").read_bytes()[:60_000])
    return (
        f"--data {text} --data.shards_dir {folder}/shards --data.max_document_bytes 512 --data.shard_tokens 4096 --data.held_out 0.1 "
        "--tokenizer.vocab_size 512 --model.d_model 32 --model.n_layer 2 --model.n_head 4 --model.n_kv_head 2 --model.d_ff 64 "
        "--model.original_seq_len 32 --seq_len 32 --lr 1e-2 --train.eval_every 5 --train.z_loss 1e-3"
    ).split()


def started(launcher: list[str], options: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, "-m", "src.cli", "pretrain", *options]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train(launcher: list[str], options: list[str]) -> str:
    process = started(launcher, options)
    printed, _ = process.communicate(timeout=280)
    assert process.returncode == 0, printed[-2000:]
    return printed


TWO = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]


@pytest.mark.slow
def test_two_processes_train_the_weights_of_one(tmp_path: Path) -> None:
    common = [*settings(tmp_path), "--tokens", "2560"]
    train([], [*common, "--out_dir", f"{tmp_path}/one", "--batch_size", "4", "--grad_accum", "2"])
    train(TWO, [*common, "--out_dir", f"{tmp_path}/two", "--batch_size", "2", "--grad_accum", "2"])

    one, two = (load_checkpoint(tmp_path / name / "final.pth") for name in ("one", "two"))
    assert one.progress["step"] == two.progress["step"] == 10
    assert one.progress["held_out_bits_per_byte"] == pytest.approx(two.progress["held_out_bits_per_byte"], abs=1e-4)
    for name, value in one.model.items():
        torch.testing.assert_close(two.model[name], value, atol=2e-5, rtol=0, msg=name)
    tables = []
    for name in ("one", "two"):
        with (tmp_path / name / "metrics.csv").open(newline="", encoding="utf-8") as file:
            tables.append([(float(row["loss"]), float(row["grad_norm"])) for row in csv.DictReader(file)])
    torch.testing.assert_close(torch.tensor(tables[0]), torch.tensor(tables[1]), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_one_goes_on(tmp_path: Path) -> None:
    common = [*settings(tmp_path), "--tokens", "102400", "--out_dir", f"{tmp_path}/run"]
    process = started(TWO, [*common, "--batch_size", "2"])
    metrics = tmp_path / "run" / "metrics.csv"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 12:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    printed, _ = process.communicate(timeout=120)
    assert "go on with: torchrun --nproc_per_node 2 -m src.cli pretrain --" in printed
    assert len(list((tmp_path / "run").glob("step_*"))) == 1
    assert "going on from" in train([], [*common, "--batch_size", "4", "--resume", "auto"])
    assert load_checkpoint(tmp_path / "run" / "final.pth").progress["step"] == 800
