"""Where kernels run: on the GPU, or on the CPU by Triton's interpreter (TRITON_INTERPRET=1), or nowhere."""

import os

import pytest
import torch
from torch import Tensor

from minifoundation.model.kernels.language import INSTALLED
from minifoundation.model.kernels.quantise import E4M3, E5M2, SLOTS, Rounded, Site, empty


@pytest.fixture
def device() -> torch.device:
    """The device whose tensors a kernel can be launched on."""
    if torch.cuda.is_available() and INSTALLED:
        return torch.device("cuda")
    if INSTALLED and os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    pytest.skip("needs a GPU, or Triton with TRITON_INTERPRET=1")


@pytest.fixture
def device_of_8_bits(device: torch.device) -> torch.device:
    """The device, where it has 8-bit floats."""
    if device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9 for 8-bit floats")
    return device


def relative(found: Tensor, exact: Tensor) -> float:
    """Return the relative error; NaN, which no bound holds for, where anything is."""
    return float((found.detach().double() - exact.detach().double()).norm() / exact.detach().double().norm())


TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3}
"""One rounding to bfloat16 is 2e-3; the interpreter cuts off instead of rounding, which is twice that."""
CUT_OFF = {E4M3: 0.13, E5M2: 0.26}
"""Relative error of cutting bits off, as the interpreter does, instead of rounding: a step of 8 bits at most."""


def site(dtype: torch.dtype, scale: float, device: torch.device) -> Site:
    """Return a site that is watched."""
    factor = torch.tensor([scale], device=device)
    return Site(dtype, factor, 1 / factor, torch.zeros(SLOTS, device=device), watched=True)


def unwritten(shape: tuple[int, int], at: Site, *, rows: bool = True, columns: bool = True) -> Rounded:
    """Return memory in which every byte is a NaN, so that one which is not written shows."""
    out = empty(shape, at, at.scale.device, rows=rows, columns=columns)
    for layout in out[:2]:
        if layout is not None:
            layout.view(torch.uint8).fill_(127)
    return out


def check_rounded(found: Rounded, expected: Rounded) -> None:
    """Compare every byte; on a GPU they are equal but for a value in 100,000 that another order of operations puts across a midpoint."""
    for layout, plain in zip(found[:2], expected[:2], strict=True):
        if layout is None or plain is None:
            continue
        assert layout.shape == plain.shape and layout.dtype == plain.dtype
        assert relative(layout.float(), plain.float()) < CUT_OFF[plain.dtype]
        if layout.is_cuda:
            assert int((layout.float() != plain.float()).sum()) <= max(2, plain.numel() // 100_000)
