"""QuACK's products against float64, on a GPU alone; and what is compiled beside."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minifoundation.model.kernels import gated
from tests.model.kernels.conftest import TOLERANCE, relative

TOLERANCES = {**TOLERANCE, torch.float16: 1e-3}
SHAPES = [(256, 128, 256), (1000, 256, 520), (37, 72, 136)]
"""Tokens, model width, feed-forward width: whole tiles, and parts of them."""


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # CUTLASS warns about itself
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_products_are_swiglu_and_its_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    obstacle = gated.obstacle(dtype, torch.cuda.get_device_capability())
    if obstacle is not None:
        pytest.skip(obstacle)
    N, D, F_ = shape
    x, d_out, residual = (drawn(N, D, dtype=dtype) for _ in range(3))
    weight, down = drawn(2 * F_, D, dtype=dtype) * 0.1, drawn(D, F_, dtype=dtype) * 0.1
    gates, activated = gated.product(x, weight)
    exact = x.double() @ weight.double().T
    assert relative(gates, exact) < TOLERANCES[dtype] and relative(activated, swiglu(exact)) < TOLERANCES[dtype]

    d_gates, again = gated.gradients(d_out, down, gates)
    leaf = gates.double().requires_grad_()
    product = swiglu(leaf)
    (expected,) = torch.autograd.grad(product, leaf, d_out.double() @ down.double())
    assert relative(d_gates, expected) < TOLERANCES[dtype] and relative(again, product) < TOLERANCES[dtype]

    summed = gated.sum_with_product(residual, activated, down)
    assert relative(summed, residual.double() + activated.double() @ down.double().T) < TOLERANCES[dtype]


def swiglu(gates: Tensor) -> Tensor:
    gate: Tensor
    up: Tensor
    gate, up = gates.unflatten(-1, (-1, 2)).unbind(-1)
    return F.silu(gate) * up


CPU = torch.device("cpu")


class Process:
    """Stands for a process that goes on until it is killed."""

    def __init__(self, command: list[str], **_: object) -> None:
        self.program = command[-1]
        self.ended: list[str] = []

    def kill(self) -> None:
        self.ended.append("killed")

    def wait(self) -> None:
        self.ended.append("and waited for")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Process]:
    """Give QuACK a cache in ``tmp_path``, and return the processes that are started from then on."""
    processes: list[Process] = []

    def start(command: list[str], **options: object) -> Process:
        processes.append(Process(command, **options))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(gated, "load", lambda _: SimpleNamespace(get_cache_path=lambda: tmp_path))
    return processes


def test_the_first_start_compiles_each_product_in_another_process(started: list[Process], monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, torch.dtype]] = []
    for name in ("product", "gradients", "sum_with_product"):
        monkeypatch.setattr(gated, name, lambda x, *_, name=name: compiled.append((name, x.dtype)))
    with gated.compiled_beside(CPU, torch.bfloat16):
        assert [process.ended for process in started] == [[], [], []]
        for process in started:
            exec(process.program, {})
    assert compiled == [(name, torch.bfloat16) for name in ("product", "gradients", "sum_with_product")]


def test_what_is_not_needed_any_more_does_not_go_on(started: list[Process]) -> None:
    with pytest.raises(KeyboardInterrupt), gated.compiled_beside(CPU, torch.bfloat16):
        raise KeyboardInterrupt
    assert [process.ended for process in started] == [["killed", "and waited for"]] * 3


def test_later_starts_find_the_cache(started: list[Process], tmp_path: Path) -> None:
    (tmp_path / "version").mkdir()
    (tmp_path / "version" / "kernel.o").touch()
    with gated.compiled_beside(CPU, torch.bfloat16):
        pass
    assert started == []


def test_a_quack_that_cannot_be_imported_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> None:
        raise ImportError("no module named cutlass")

    monkeypatch.setattr(gated, "load", broken)
    with gated.compiled_beside(CPU, torch.bfloat16):
        pass
