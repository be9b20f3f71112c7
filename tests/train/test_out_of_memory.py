"""What is proposed when memory runs out: it is less, by the prediction, and leaves the tokens of a step as they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from minifoundation import config
from minifoundation.config import REPOSITORY, RunConfig
from minifoundation.distributed import Split, World
from minifoundation.errors import UserError
from minifoundation.runtime import Machine
from minifoundation.train.finder import with_batch_size
from minifoundation.train.out_of_memory import _changed, is_out_of_memory, refuse_too_large, remedy, too_large
from minifoundation.train.plan import plan

GIB = 2**30
H100 = Machine(torch.device("cpu"), "a GPU", 80 * GIB, None)


def made(**sections: dict[str, Any]) -> RunConfig:
    values = config.read_yaml(REPOSITORY / "configs" / "model_0p5b.yaml")
    base = {"data": {"source": "x"}, "train": {"tokens": 10**9, "precision": "bf16"}}
    return config.build(RunConfig, config.merged(config.merged(values, base), sections), "test")


def test_fewer_rows_and_as_many_tokens() -> None:
    run = made(train={"batch_size": 64, "grad_accum": 2})
    assert plan(run, 1).memory_total > 80 * GIB
    options, needed = remedy(run, H100, World())
    assert options in ({"batch_size": 32, "grad_accum": 4}, {"batch_size": 16, "grad_accum": 8})
    assert needed == plan(made(train=options), 1).memory_total < 0.92 * 80 * GIB


def test_one_row_that_does_not_fit_is_recomputed() -> None:
    run = made(train={"batch_size": 1, "seq_len": 32_768}, model={"rope": {"scaling": "yarn", "factor": 8}})
    small = replace(H100, memory_bytes=24 * GIB)
    options, needed = remedy(run, small, World())
    assert options["model.checkpointing"] == "attention" and "batch_size" not in options
    assert needed < plan(run, 1).memory_total


@pytest.mark.parametrize(("device", "offloaded"), [("cuda", True), ("cpu", False)])
def test_activations_are_offloaded_where_they_can_be(device: str, offloaded: bool) -> None:
    run = made(train={"seq_len": 65_536}, model={"rope": {"scaling": "yarn", "factor": 16}, "n_layer": 48})
    machine = Machine(torch.device(device), "a machine", 32 * GIB, None)
    assert (remedy(run, machine, World())[0]["model.checkpointing"] == "offload") == offloaded


def test_where_nothing_fits_the_least_is_proposed() -> None:
    options, needed = remedy(made(train={"batch_size": 4}), replace(H100, memory_bytes=GIB), World())
    assert (
        options["train.optimizer_states"] == "int8" and options["model.checkpointing"] in ("offload", "full") and options["batch_size"] == 1
    )
    assert needed > GIB


@pytest.mark.parametrize("chunk", [16, 48, 8208])
def test_what_is_proposed_in_8_bits_can_be_had(chunk: int) -> None:
    options, _ = remedy(made(train={"precision": "fp8", "loss_chunk": chunk}), replace(H100, memory_bytes=GIB), World())
    smaller = options["train.loss_chunk"]
    assert smaller <= chunk and made(train={"precision": "fp8", "loss_chunk": smaller}).train.loss_chunk == smaller


@pytest.mark.parametrize(
    ("split", "moments", "int8"),
    [
        (Split("ddp"), False, True),
        (Split("ddp"), True, False),
        (Split("ddp", owners=8), False, False),
        (Split("fsdp", 8), False, False),
        (Split("hsdp", 4), False, False),
    ],
)
def test_moments_in_int8_are_proposed_where_they_can_be_had(split: Split, moments: bool, int8: bool) -> None:
    """Not in parts, and not to a run that goes on with others: both would be refused."""
    small, eight = replace(H100, memory_bytes=GIB), World(0, 8, 0, 4)
    options, needed = remedy(made(train={"batch_size": 4}), small, eight, split, moments=moments)
    assert ("train.optimizer_states" in options) is int8
    assert needed == plan(_changed(made(train={"batch_size": 4}), options), 8, split).memory_total
    error = too_large(made(train={"batch_size": 4}), small, eight, going_on={}, split=split, moments=moments)
    assert ("int8" in str(error)) is int8
    if moments:
        return
    with pytest.raises(UserError, match="not even one row") as caught:
        with_batch_size(made(train={"batch_size": "auto"}), small, split=split)
    assert ("int8" in str(caught.value)) is int8


def test_the_line_has_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["pretrain", "--config", "configs/model_0p5b.yaml", "--batch_size", "32"]
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "src.cli", *line])
    monkeypatch.setattr("sys.argv", ["src/cli.py", *line])
    error = too_large(made(train={"batch_size": 32}), H100, World(), going_on={"resume": "auto"})
    assert str(error).startswith("train.batch_size: 32 rows of 4096 tokens do not fit the memory of a GPU (peak ")
    assert str(error).endswith(": python -m src.cli pretrain --config configs/model_0p5b.yaml --batch_size 16 --grad_accum 2 --resume auto")


def test_what_memory_says_when_it_runs_out() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


@dataclass(frozen=True)
class Gpu(Machine):
    """A GPU that is only talked about."""

    @property
    def is_cuda(self) -> bool:
        return True


def test_what_cannot_fit_is_refused_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "src.cli", "longft", "--ckpt_in", "final.pth"])
    monkeypatch.setattr("sys.argv", ["src/cli.py", "longft", "--ckpt_in", "final.pth"])
    long = made(train={"batch_size": 1, "seq_len": 65_536}, model={"rope": {"scaling": "yarn", "factor": 16}})
    refuse_too_large(long, Gpu(torch.device("cpu"), "a GPU", 80 * GIB, None), World())
    refuse_too_large(long, replace(H100, memory_bytes=GIB), World(), planned=True)  # on a CPU a plan may be for a GPU
    with pytest.raises(UserError, match=r"does not fit the memory of .* of 1\.0 GiB"):
        refuse_too_large(long, replace(H100, memory_bytes=GIB), World())
    problem = r"train\.seq_len: 1 row of 65536 tokens does not fit the memory of a GPU \(predicted 39\.\d of "
    line = r"python -m src\.cli longft .* attention$"
    with pytest.raises(UserError, match=problem + rf"24\.0 GiB\); with --model\.checkpointing attention 1\d\.\d GiB are predicted: {line}"):
        refuse_too_large(long, Gpu(torch.device("cpu"), "a GPU", 24 * GIB, None), World())
    with pytest.raises(
        UserError, match=problem + r"4\.0 GiB\); even with --model\.checkpointing .*; take shorter rows, a smaller model or"
    ):
        refuse_too_large(long, Gpu(torch.device("cpu"), "a GPU", 4 * GIB, None), World())
