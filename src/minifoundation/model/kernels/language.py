"""Triton where it is installed; builds of torch for CPUs bring none, and there the plain definition of each kernel runs instead."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from minifoundation.packages import installed

INSTALLED = installed("triton.language")
triton: Any = import_module("triton") if INSTALLED else None
tl: Any = import_module("triton.language") if INSTALLED else None
INTERPRETED: Any = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1") if INSTALLED else None
"""Whether kernels run by Triton's interpreter, on the CPU, which knows no assembly."""


def jit(kernel: Any) -> Any:
    """Return ``kernel`` compiled by Triton at its first launch; without Triton as it is, and then nothing may launch it."""
    return triton.jit(kernel) if INSTALLED else kernel


def runs_on(x: Tensor) -> bool:
    """Return whether kernels run on ``x``: on a GPU, and not for float64, since they compute in float32."""
    return INSTALLED and x.is_cuda and x.dtype != torch.float64
