"""Two processes compute what one computes."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minifoundation.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_two_processes_train_the_weights_of_one(tmp_path: Path) -> None:
    text = tmp_path / "verse.txt"
    text.write_bytes((ROOT / "examples" / "shakespeare.txt").read_bytes()[:60_000])
    common = (
        f"--data {text} --data.shards_dir {tmp_path}/shards --data.max_document_bytes 512 --data.shard_tokens 4096 --data.held_out 0.1 "
        "--tokenizer.vocab_size 512 --model.d_model 32 --model.n_layer 2 --model.n_head 4 --model.n_kv_head 2 --model.d_ff 64 "
        "--model.original_seq_len 32 --seq_len 32 --tokens 2560 --lr 1e-2 --train.eval_every 5 --train.z_loss 1e-3"
    ).split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def train(launcher: list[str], *options: str) -> None:
        command = [sys.executable, *launcher, "-m", "src.cli", "pretrain", *common, *options]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]

    train([], "--out_dir", f"{tmp_path}/one", "--batch_size", "4", "--grad_accum", "2")
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "0",
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
    ]
    train(torchrun, "--out_dir", f"{tmp_path}/two", "--batch_size", "2", "--grad_accum", "2")

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
