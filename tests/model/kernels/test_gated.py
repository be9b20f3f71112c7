"""QuACK's products against float64; they run on a GPU alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minifoundation.model.kernels import gated
from tests.model.kernels.conftest import TOLERANCE, relative

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # CUTLASS warns about itself

TOLERANCES = {**TOLERANCE, torch.float16: 1e-3}
SHAPES = [(256, 128, 256), (1000, 256, 520), (37, 72, 136)]
"""Tokens, model width, feed-forward width: whole tiles, and parts of them."""


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


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
