"""What this machine can do, and what is said when it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minifoundation import runtime
from minifoundation.errors import UserError
from minifoundation.runtime import Machine, Moment

CPU = Machine(torch.device("cpu"), "CPU", 2**34, None)
OLD_GPU = Machine(torch.device("cuda", 0), "Tesla T4", 2**34, None)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4060", 30.2),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H200 NVL", 835.0),
        ("Tesla T4", None),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4060 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
    ],
)
def test_peaks_by_name(name: str, tflops: float | None) -> None:
    assert runtime.peak_flops(name) == (None if tflops is None else tflops * 1e12)


@pytest.mark.parametrize(("name", "cores", "gigahertz"), [("RTX 4090", 512, 2.520), ("RTX 4060", 96, 2.460), ("RTX 3090", 328, 1.695)])
def test_peaks_of_geforce_sum_in_fp32(name: str, cores: int, gigahertz: float) -> None:
    """A tensor core of these does 64 multiply-adds a clock when it sums in fp32, half of what it does in fp16."""
    assert runtime.peak_flops(f"NVIDIA GeForce {name}") == pytest.approx(cores * 128 * gigahertz * 1e9, rel=0.005)


def test_bf16_without_bf16_arithmetic_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    with pytest.raises(UserError, match=r"--bf16: Tesla T4 has no bf16 arithmetic; use --amp alone"):
        runtime.compute_dtype("bf16", OLD_GPU)
    assert runtime.compute_dtype("fp16", OLD_GPU) == torch.float16
    assert runtime.compute_dtype("bf16", CPU) == torch.bfloat16
    assert runtime.compute_dtype("fp32", CPU) == torch.float32


@pytest.mark.parametrize(("capability", "can"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_8_bits_begin_with_ada(capability: tuple[int, int], can: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(runtime, "installed", lambda _: True)
    gpu = Machine(torch.device("cuda", 0), "NVIDIA A100", 2**34, None)
    expected = None if can else "NVIDIA A100 has compute capability 8.0, and 8-bit products begin with 8.9"
    assert runtime.fp8_obstacle(gpu) == expected and runtime.compute_dtype("fp8", CPU) == torch.bfloat16
    assert runtime.fp8_obstacle(CPU) == "CPU has no 8-bit products"


def test_no_compiler_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runtime.can_compile(CPU) == "no C++ compiler (g++ or clang++) is on the PATH"


def test_moments_on_a_cpu_are_the_clock() -> None:
    earlier = Moment(CPU)
    later = Moment(CPU)
    assert 0 <= later.seconds_since(earlier) < 1


def test_this_machine_has_memory() -> None:
    where = runtime.machine()
    assert where.memory_bytes > 2**28 and where.peak_memory_bytes() > 2**20
    assert runtime.free_disk_bytes(Path("/nowhere/at/all")) > 0
