"""Products with SwiGLU or its gradients in their epilogue, by QuACK (package quack-kernels, for Hopper and later).

Letters: N tokens, D model width, F feed-forward width. Gate and up lie interleaved here: rows 2i and 2i + 1 of the weight, and columns
likewise, since a thread of the epilogue must hold both.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from subprocess import DEVNULL
from typing import Any

import torch
from torch import Tensor

from minifoundation.model.kernels.libraries import load
from minifoundation.packages import installed

INTERFACE = "quack.gemm_interface"
INSTALLED = installed(INTERFACE)


def interleaved(gate_up: Tensor) -> Tensor:
    """Return the view of a weight (2F, D), gate above up, whose rows are interleaved: (F, 2, D)."""
    return gate_up.view(2, -1, gate_up.shape[1]).transpose(0, 1)


def apart(gate_up: Tensor) -> Tensor:
    """Return an interleaved (2F, D) with gate above up again."""
    return gate_up.view(-1, 2, gate_up.shape[1]).transpose(0, 1).reshape(gate_up.shape)


def product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gates x weight^T, (N, 2F), and SwiGLU's product of them, (N, F), of x (N, D) and an interleaved weight (2F, D)."""
    quack = load(INTERFACE)
    config = quack.GemmConfig(tile_m=128, tile_n=192, pingpong=True, cluster_m=2, cluster_n=1, is_dynamic_persistent=False)
    gates, activated = quack.gemm_gated(x, weight.T, activation="swiglu", config=config)
    return gates, activated


def gradients(d_out: Tensor, down: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of ``gates`` (N, 2F) and SwiGLU's product again, (N, F), of d_out (N, D) through ``down`` (D, F)."""
    quack = load(INTERFACE)
    config = quack.GemmConfig(tile_m=128, tile_n=128, pingpong=True, cluster_m=2, cluster_n=1, is_dynamic_persistent=True)
    d_gates, activated = quack.gemm_dgated(d_out, down, gates, activation="swiglu", config=config, dynamic_scheduler=True)[:2]
    return d_gates, activated


def sum_with_product(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return residual + x weight^T, (N, D), of x (N, F) and weight (D, F), added before it is rounded."""
    result: Tensor = load(INTERFACE).gemm_add(x, weight.T, residual, tuned=False)
    return result


def obstacle(dtype: torch.dtype, capability: tuple[int, int]) -> str | None:
    """Return why QuACK's products are not for a GPU of ``capability``, or None; whether they work is what ``fault`` says."""
    if not INSTALLED:
        return "needs the package quack-kernels"
    if capability[0] not in (9, 10):
        return f"needs compute capability 9.x or 10.x, not {capability[0]}.{capability[1]}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"needs bf16 or fp16, not {dtype}"
    return None


def fault(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return how QuACK's products fail on ``device``, for which they are, or None: they are tried on a small case."""
    small = small_cases(device, dtype)
    try:
        (_, activated), *_ = [case() for case in small.values()]
        x, weight = small["product"].args
        gate, up = (x.float() @ weight.float().T).unflatten(-1, (-1, 2)).unbind(-1)
        exact = torch.nn.functional.silu(gate) * up
        wrong = float((activated.float() - exact).norm() / exact.norm())
    except Exception as error:  # versions of QuACK and CUTLASS that do not fit each other fail in many ways
        return f"fails here ({type(error).__name__}: {str(error).splitlines()[0][:80]})"
    return None if wrong < 1e-2 else f"computes something else here (error {wrong:.3g})"


def small_cases(device: torch.device, dtype: torch.dtype) -> dict[str, partial[Any]]:
    """Return each kind of product with small operands."""
    shapes = (256, 128), (512, 128), (128, 256), (256, 512), (256, 256)
    x, weight, down, gates, activated = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    return {
        "product": partial(product, x, weight),
        "gradients": partial(gradients, x, down, gates),
        "sum": partial(sum_with_product, x, activated, down),
    }


@contextmanager
def compiled_beside(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """At a user's first start, when QuACK's cache is empty, have a process compile each kind of product while the block runs.

    The block compiles FlashAttention 4 meanwhile. QuACK locks each kernel in its cache, so what is needed before it is done is waited for.
    QuACK's own pool of processes takes longer to start than this takes.
    """
    processes: list[subprocess.Popen[bytes]] = []
    try:
        processes.extend(_compiling(device, dtype))
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _compiling(device: torch.device, dtype: torch.dtype) -> Iterator[subprocess.Popen[bytes]]:
    with suppress(Exception):  # it only saves time; ``fault`` says what is wrong with QuACK
        if any(load("quack.cache.jit").get_cache_path().glob("*/*.o")):
            return
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        for kind in ("product", "gradients", "sum"):
            case = f"gated.small_cases(torch.device({str(device)!r}), {dtype})[{kind!r}]()"
            command = [sys.executable, "-c", f"import torch; from minifoundation.model.kernels import gated; {case}"]
            yield subprocess.Popen(command, env=environment, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL)
