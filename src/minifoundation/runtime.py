"""This machine: device, precision, peak rate, memory. Alone sets the switches of torch's backends."""

from __future__ import annotations

import gc
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from minifoundation.container import memory_bytes
from minifoundation.errors import UserError
from minifoundation.packages import installed
from minifoundation.wording import counted

PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H200": 989.4,
    "H200 NVL": 835.0,
    "GH200": 989.4,
    "B200": 2250.0,
    "A100": 312.0,
    "A10G": 70.0,
    "L40S": 362.0,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 4060": 30.2,
    "RTX 3090": 71.0,
}
"""Dense bf16 peak by words of the GPU's name, longest match first [NVIDIA's datasheets; GeForce: the whitepapers, fp32 accumulation]."""


@dataclass(frozen=True)
class Machine:
    """The device a run computes on."""

    device: torch.device
    name: str
    memory_bytes: int
    peak_flops: float | None
    """Dense bf16 FLOP/s, None where it is not known: MFU is then left empty."""

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def capability(self) -> tuple[int, int]:
        """CUDA compute capability, (0, 0) elsewhere."""
        return torch.cuda.get_device_capability(self.device) if self.is_cuda else (0, 0)

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Give back the device memory that nothing holds any more, and count its peak anew."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_memory_bytes(self) -> int:
        """Return the most device memory allocated so far, or since ``forget``; on a CPU the largest resident size of the process."""
        if self.is_cuda:
            return torch.cuda.max_memory_allocated(self.device)
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Moment:
    """A point in the device's work: it has come when everything launched before it is done."""

    def __init__(self, where: Machine) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if where.is_cuda else None
        if self._event is not None:
            self._event.record()
        self._seconds = time.perf_counter()

    def seconds_since(self, earlier: Moment) -> float:
        """Return the device's time between two moments; on a GPU this waits until both have come."""
        if self._event is None or earlier._event is None:
            return self._seconds - earlier._seconds
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1e3


def machine(local_rank: int = 0) -> Machine:
    """Return the GPU of this process, or the CPU where there is none."""
    if torch.cuda.is_available():
        _keep_compiled_attention()
        properties = torch.cuda.get_device_properties(local_rank)
        return Machine(torch.device("cuda", local_rank), properties.name, properties.total_memory, peak_flops(properties.name))
    return Machine(torch.device("cpu"), f"CPU, {counted(torch.get_num_threads(), 'thread')}", memory_bytes(), None)


def _keep_compiled_attention() -> None:
    """Have FlashAttention 4 keep what it compiles, in the user's cache folder: else each start waits for it again (docs/speed.md).

    It reads its settings where it is imported, which is later; its own folder would be in /tmp, where others may write.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minifoundation" / "flash_attention"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a home that cannot be written to costs the next start some seconds
        return
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder))


def peak_flops(gpu_name: str) -> float | None:
    """Return the dense bf16 peak of a GPU in FLOP/s by its name, or None."""
    if " MIG " in gpu_name:  # a part of one
        return None
    for part in sorted(PEAK_TFLOPS, key=len, reverse=True):
        whole = "$" if part.startswith("RTX") else r"\b"  # what else a GeForce is called tells another chip: Ti, D, Laptop GPU
        if re.search(rf"\b{part}{whole}", gpu_name):
            return PEAK_TFLOPS[part] * 1e12
    return None


def compute_dtype(precision: str, where: Machine) -> torch.dtype:
    """Return the dtype of compute for ``train.precision``.

    Raises:
        UserError: bf16 on a GPU without bf16 arithmetic.
    """
    match precision:
        case "bf16" | "fp8":
            if where.is_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
                raise UserError("--bf16", f"{where.name} has no bf16 arithmetic", "use --amp alone (fp16 with loss scaling)")
            return torch.bfloat16
        case "fp16":
            return torch.float16
        case _:
            return torch.float32


def make_deterministic() -> None:
    """Have every kernel of torch give the same bits in every run; one that cannot is an error where it is called."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # no kernel here reads memory that it has not written


def fp8_obstacle(where: Machine) -> str | None:
    """Return why ``train.precision: fp8`` cannot run here, or None when it can."""
    if not where.is_cuda:
        return f"{where.name} has no 8-bit products"
    if where.capability < (8, 9):
        return f"{where.name} has compute capability {where.capability[0]}.{where.capability[1]}, and 8-bit products begin with 8.9"
    return None if installed("triton.language") else "triton is not installed"


def can_compile(where: Machine) -> str | None:
    """Return why torch.compile cannot run here, or None when it can."""
    compiler = os.environ.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    if where.is_cuda and not installed("triton.language"):
        return "triton is not installed"
    if compiler is None or shutil.which(compiler) is None:
        return "no C++ compiler (g++ or clang++) is on the PATH"
    return None


def compiled_graphs() -> int:
    """Return how many graphs torch.compile has made in this process."""
    compiler = sys.modules.get("torch._dynamo.utils")  # not imported before something is compiled
    return int(compiler.counters["stats"]["unique_graphs"]) if compiler else 0


@contextmanager
def collector_held() -> Iterator[Callable[[], None]]:
    """Keep Python's garbage collector from running by itself, and give a function that runs it.

    With torch and its compiler loaded a full collection takes up to half a second, in which nothing is launched, and a training step
    leaves nothing for it (docs/speed.md). The first call sets aside all that lives, and later ones take a fraction of a millisecond.
    """
    was_on, frozen = gc.isenabled(), False

    def collect() -> None:
        nonlocal frozen
        gc.collect()
        if not frozen:
            gc.freeze()
            frozen = True

    gc.disable()
    try:
        yield collect
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def free_disk_bytes(folder: Path) -> int:
    """Return the free bytes on the disk that holds ``folder`` or its nearest existing parent."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
