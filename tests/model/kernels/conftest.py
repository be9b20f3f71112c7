"""Where kernels run: on the GPU, or on the CPU by Triton's interpreter (TRITON_INTERPRET=1), or nowhere."""

import os

import pytest
import torch

from minifoundation.model.kernels.language import INSTALLED


@pytest.fixture
def device() -> torch.device:
    """The device whose tensors a kernel can be launched on."""
    if torch.cuda.is_available() and INSTALLED:
        return torch.device("cuda")
    if INSTALLED and os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    pytest.skip("needs a GPU, or Triton with TRITON_INTERPRET=1")


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the relative error; NaN, which no bound holds for, where anything is."""
    return float((found.detach().double() - exact.detach().double()).norm() / exact.detach().double().norm())


TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3}
"""One rounding to bfloat16 is 2e-3; the interpreter cuts off instead of rounding, which is twice that."""
