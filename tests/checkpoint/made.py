"""Checkpoints small enough to be written by the thousand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minifoundation.checkpoint import Checkpoint, Saver, step_folder
from minifoundation.config import DataConfig, ModelConfig, RunConfig, TrainConfig


def made(step: int = 3, **changes: Any) -> Checkpoint:
    """Return a checkpoint of ``step`` with two weights."""
    config = RunConfig(
        model=ModelConfig(d_model=16, n_layer=1, n_head=2, n_kv_head=1, d_ff=24, original_seq_len=4096),
        data=DataConfig(source="x"),
        train=TrainConfig(tokens=10),
    )
    weights = {"a": torch.randn(4, 3), "b": torch.arange(3.0)}
    return Checkpoint(config, weights, b"spm", {"step": step, "sample": 7}, **changes)


def full(step: int = 3) -> Checkpoint:
    """Return a checkpoint that has something in every field."""
    return made(
        step,
        ema={"a": torch.ones(2)},
        ledger=[{"source": "x"}],
        optimizer={"step/a": torch.tensor(3.0), "exp_avg/a": torch.randn(4, 3), "exp_avg.codes/b": torch.arange(5, dtype=torch.uint8)},
        scaler={"scale": 1024.0, "_growth_tracker": 7},
        window={"values": torch.full((2, 16), float("inf")), "count": torch.tensor(5)},
        kernel_state={"amax": torch.rand(3), "half": torch.ones(3, dtype=torch.bfloat16)},
        kernels={"attention": "flash"},
    )


def save_step(checkpoint: Checkpoint, out_dir: Path, *, keep: int, keep_every: int | None = None) -> Path:
    """Return the step folder of ``checkpoint``, written as a run writes it that waits for it."""
    saver = Saver(out_dir, keep=keep, keep_every=keep_every, background=False, if_fails="stop", say=print)
    saver.save(checkpoint)
    return step_folder(out_dir, checkpoint.progress["step"])


def same(a: Checkpoint, b: Checkpoint) -> bool:
    """Return whether two checkpoints are equal bit for bit."""
    one, two = a.tensors(), b.tensors()
    equal = one.keys() == two.keys() and all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one)
    return equal and a.state() == b.state() and a.tokenizer_model == b.tokenizer_model
