"""The arithmetic of a run before it starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minifoundation import config
from minifoundation.config import REPOSITORY, RunConfig
from minifoundation.distributed import Split, World
from minifoundation.errors import UserError
from minifoundation.runtime import Machine
from minifoundation.train.parallel import accumulated
from minifoundation.train.plan import describe, plan

H100 = Machine(torch.device("cpu"), "NVIDIA H100 80GB HBM3", 80 * 2**30, 989.4e12)


def run_config(**train: Any) -> RunConfig:
    values = config.read_yaml(REPOSITORY / "configs" / "model_0p5b.yaml")
    return config.build(RunConfig, config.merged(values, {"data": {"source": "x"}, "train": {"precision": "bf16", **train}}), "test")


def test_the_mission_line_by_hand() -> None:
    planned = plan(run_config(tokens=200_000_000, batch_size=1, grad_accum=32), 1)
    assert (planned.tokens_per_step, planned.steps, planned.warmup_steps) == (131_072, 1525, 77)
    assert planned.tokens == 1525 * 131_072 <= 200_000_000
    assert planned.parameters == 493_929_984


@pytest.mark.parametrize(
    ("train", "lower"),
    [
        ({"grad_accum": 2}, "--grad_accum"),
        ({"batch_size": 2}, "--batch_size"),
        ({}, "--seq_len"),
        ({"tokens_per_step": 8192}, "--train.tokens_per_step"),
    ],
)
def test_too_few_tokens_for_a_step_name_what_makes_it_smaller(train: dict[str, Any], lower: str) -> None:
    run = accumulated(run_config(**{"batch_size": 1, "grad_accum": 1, "tokens": 100} | train), World())
    with pytest.raises(UserError) as caught:
        plan(run, 1)
    assert caught.value.remedy == f"raise --tokens or lower {lower}"


def test_processes_share_a_step() -> None:
    one, eight = (plan(run_config(tokens=10**9, batch_size=2, grad_accum=4), size) for size in (1, 8))
    assert eight.samples_per_step == 8 * one.samples_per_step == 64 and eight.steps == one.steps // 8


def test_processes_that_read_a_row_together_share_it() -> None:
    one, shared = (plan(run_config(tokens=10**9, grad_accum=4, context_parallel=together), 8) for together in (1, 4))
    assert (one.samples_per_step, shared.samples_per_step) == (32, 8)
    assert shared.flops_per_token == one.flops_per_token
    config = run_config(tokens=10**9, grad_accum=4, context_parallel=4)
    text = describe(config, plan(config, 8, Split("ddp")), H100, 8)
    assert "(1 row x 4 micro-batches x 4096 tokens x 2 groups of 4 processes)" in text
    assert "; 4 read a row together, 1,024 tokens each" in text


def test_the_description_names_hours_and_memory() -> None:
    chosen = run_config(tokens=200_000_000, batch_size=1, grad_accum=32)
    text = describe(chosen, plan(chosen, 1), H100, 1)
    seconds = plan(chosen, 1).flops_per_token * plan(chosen, 1).tokens / (0.4 * 989.4e12)
    assert f"{seconds / 60:.1f} min at 40%" in text and "MFU of an" not in text
    assert f"{plan(chosen, 1).memory_total / 2**30:.1f} GiB of 80.0 GiB" in text
    # three step checkpoints of weights and two moments, and the weights of final.pth, in fp32
    assert f"{493_929_984 * 4 * (3 * 3 + 1) / 2**30:.1f} GiB for checkpoints" in text
