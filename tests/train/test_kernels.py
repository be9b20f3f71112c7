"""Which attention kernel a run takes: the fastest measured, the same on every process, the checkpoint's when resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from minifoundation import runtime
from minifoundation.config import RunConfig
from minifoundation.distributed import World
from minifoundation.model.attention import Backend
from minifoundation.model.kernels import gated
from minifoundation.runtime import Machine
from minifoundation.train import kernels
from minifoundation.train.kernels import Kernels, attention_kernel, chosen_kernels, milliseconds, swiglu_kernel

Make = Callable[..., RunConfig]


@dataclass(frozen=True)
class Pretended(Machine):
    """A CPU that says it is a GPU: what is chosen is decided from what is measured, and that is pretended too."""

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def capability(self) -> tuple[int, int]:
        return 9, 0


GPU = Pretended(torch.device("cpu"), "GPU", 2**34, None)
CPU = Machine(torch.device("cpu"), "CPU", 2**34, None)


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[Backend]]]:
    """A function that sets which kernels can run and what each takes, and returns the list of what was timed."""

    def pretend(**times: float) -> list[list[Backend]]:
        timed: list[list[Backend]] = []

        def measured(contenders: Iterable[Backend], *_: object) -> dict[Backend, float]:
            timed.append(list(contenders))
            return {kernel: times[kernel] for kernel in timed[-1]}

        monkeypatch.setattr(kernels, "usable_kernels", lambda *_: tuple(times))
        monkeypatch.setattr(kernels, "milliseconds", measured)
        return timed

    return pretend


def test_the_fastest_is_taken_and_all_times_are_said(settings: Make, measuring: Callable[..., list[list[Backend]]]) -> None:
    timed = measuring(flash4=4.0, cudnn=3.5, flash=math.inf, flex=1.0, efficient=1.0, math=1.0)
    kernel, line = attention_kernel(settings(), GPU, World(), None)
    assert kernel == "cudnn" and timed == [["flash4", "cudnn", "flash"]], "the others are slower, so they are not timed"
    assert line == "attention: cudnn, 3.50 ms forward and backward of a block at 2 x 32 (flash4 4.00 ms, flash failed)"


def test_within_documents_flex_is_timed_too(settings: Make, measuring: Callable[..., list[list[Backend]]]) -> None:
    timed = measuring(flash=5.0, flex=4.0, math=1.0)
    kernel, _ = attention_kernel(settings(data={"mask_documents": True}), GPU, World(), None)
    assert kernel == "flex" and timed == [["flash", "flex"]]


def test_every_process_takes_the_kernel_that_is_fastest_over_all(settings: Make, measuring: Callable[..., list[list[Backend]]]) -> None:
    class Two(World):
        """Another process, for which cuDNN is the slower one by more than it is faster here."""

        def total(self, values: Tensor) -> Tensor:
            return values + torch.tensor([9.0, 4.0])

    measuring(cudnn=3.0, flash=4.0)
    kernel, line = attention_kernel(settings(), GPU, Two(size=2), None)
    assert kernel == "flash" and line is not None and "flash, 4.00 ms" in line and "cudnn 6.00 ms" in line


def test_a_resumed_run_repeats_the_choice(settings: Make, measuring: Callable[..., list[list[Backend]]]) -> None:
    timed = measuring(cudnn=3.0, flash=4.0)
    assert attention_kernel(settings(), GPU, World(), "flash") == ("flash", "attention: flash, as in the checkpoint")
    assert timed == [], "without measuring"
    kernel, line = attention_kernel(settings(), GPU, World(), "flash4")
    assert kernel == "cudnn" and line is not None and line.endswith("; flash4, which the checkpoint was trained with, cannot run here")


def test_nothing_is_measured_where_there_is_no_choice(settings: Make, measuring: Callable[..., list[list[Backend]]]) -> None:
    timed = measuring(efficient=3.0, math=1.0)
    assert attention_kernel(settings(), GPU, World(), None) == ("efficient", "attention: efficient, the only kernel that can run here")
    assert attention_kernel(settings(model={"attention": "math"}), GPU, World(), None) == ("math", None)
    assert attention_kernel(settings(), CPU, World(), None) == ("auto", None)
    assert timed == []


@pytest.mark.parametrize("masked", [False, True])
def test_times_are_measured_and_a_kernel_that_fails_is_last(settings: Make, masked: bool) -> None:
    config = settings(data={"mask_documents": masked}, train={"seq_len": 32, "batch_size": 1})
    times = milliseconds(("auto", "math", "cudnn"), config, CPU)
    assert 0 < times["auto"] < 1000 and 0 < times["math"] < 1000 and times["cudnn"] == math.inf, "cuDNN needs a GPU"


def test_swiglu_is_in_the_products_where_quack_works(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    half = settings(train={"precision": "bf16"})
    monkeypatch.setattr(runtime, "compute_dtype", lambda *_: torch.bfloat16)  # this GPU is none
    monkeypatch.setattr(gated, "obstacle", lambda *_: None)
    monkeypatch.setattr(gated, "fault", lambda *_: None)
    assert swiglu_kernel(half, GPU) == ("quack", "swiglu: in the products beside it, by QuACK")
    assert swiglu_kernel(half, GPU, "own") == ("own", None), "a resumed run repeats what it began with"
    assert swiglu_kernel(settings(train={"precision": "bf16"}, model={"swiglu": "own"}), GPU) == ("own", None)
    assert swiglu_kernel(settings(train={"precision": "fp8"}), GPU) == ("own", None)
    named = settings(train={"precision": "bf16"}, model={"swiglu": "quack"})
    monkeypatch.setattr(gated, "fault", lambda *_: "fails here (TypeError: of a version)")
    warning = "warning: model.swiglu: quack fails here (TypeError: of a version); using own"
    assert swiglu_kernel(half, GPU) == ("own", warning), "it is installed and slower without, and nobody would know"
    assert swiglu_kernel(half, GPU, "quack") == swiglu_kernel(named, GPU) == ("own", warning)
    monkeypatch.setattr(gated, "obstacle", lambda *_: "needs the package quack-kernels")
    assert swiglu_kernel(half, GPU) == ("own", None), "auto takes what is there, without a word"
    warning = "warning: model.swiglu: quack needs the package quack-kernels; using own"
    assert swiglu_kernel(half, GPU, "quack") == swiglu_kernel(named, GPU) == ("own", warning)


def test_quack_is_compiled_beside_the_choice_of_attention_where_it_is_to_be_used(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    @contextmanager
    def beside(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
        order.append(f"compiling for {device} in {dtype}")
        yield
        order.append("done")

    def chosen(*_: object) -> tuple[Backend, None]:
        order.append("attention")
        return "flash4", None

    monkeypatch.setattr(runtime, "compute_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(gated, "obstacle", lambda *_: None)
    monkeypatch.setattr(gated, "fault", lambda *_: order.append("quack"))
    monkeypatch.setattr(gated, "compiled_beside", beside)
    monkeypatch.setattr(kernels, "attention_kernel", chosen)
    half = settings(train={"precision": "bf16"})
    assert chosen_kernels(half, GPU, World(), {})[0] == Kernels("flash4", "quack", "flash4")
    assert order == ["compiling for cpu in torch.bfloat16", "attention", "quack", "done"]
    for config, recorded in ((settings(train={"precision": "fp8"}), {}), (half, {"swiglu": "own"})):
        order.clear()
        assert chosen_kernels(config, GPU, World(), recorded)[0].swiglu == "own"
        assert order == ["attention"], "nothing is compiled for what does not run"


def test_quack_is_for_hopper_and_later_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated, "INSTALLED", True)
    assert gated.obstacle(torch.bfloat16, (8, 0)) == "needs compute capability 9.x or 10.x, not 8.0"
    assert gated.obstacle(torch.float32, (9, 0)) == "needs bf16 or fp16, not torch.float32"
    monkeypatch.setattr(gated, "INSTALLED", False)
    assert gated.obstacle(torch.bfloat16, (9, 0)) == "needs the package quack-kernels"
