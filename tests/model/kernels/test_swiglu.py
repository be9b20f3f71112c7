"""SwiGLU's product and gradients against autograd in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minifoundation.model.kernels import swiglu
from minifoundation.model.kernels.quantise import E4M3, E5M2, plain_rounded
from tests.model.kernels.conftest import TOLERANCE, check_rounded, relative, site, unwritten

SHAPES = [(5, 100), (3, 2050), (1, 4096)]
DTYPES = [torch.float32, torch.bfloat16]


def exact(gate_up: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    leaf = gate_up.double().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    product = F.silu(gate) * up
    (gradient,) = torch.autograd.grad(product, leaf, d.double())
    return product.detach(), gradient


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_plain_definition_is_autograd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate_up, d = torch.randn(shape[0], 2 * shape[1]).to(dtype), torch.randn(shape).to(dtype)
    product, gradient = exact(gate_up, d)
    assert relative(swiglu.plain_product(gate_up), product) < TOLERANCE[dtype]
    found, again = swiglu.plain_gradients(gate_up, d)
    assert relative(found, gradient) < TOLERANCE[dtype] and torch.equal(again, swiglu.plain_product(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_are_the_plain_definition(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    gate_up, d = torch.randn(shape[0], 2 * shape[1]).to(device, dtype), torch.randn(shape).to(device, dtype)
    product, gradient = exact(gate_up, d)
    found, again, d_found = torch.full_like(d, torch.nan), torch.full_like(d, torch.nan), torch.full_like(gate_up, torch.nan)
    swiglu.launch_product(gate_up, found, None)
    swiglu.launch_gradients(gate_up, d, d_found, again)
    assert relative(found, product) < TOLERANCE[dtype] and torch.equal(found, again)
    assert relative(d_found, gradient) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(8, 100), (100, 200), (32, 2050)])
def test_the_kernels_round_to_8_bits(shape: tuple[int, int], device_of_8_bits: torch.device) -> None:
    gate_up = torch.randn(shape[0], 2 * shape[1], device=device_of_8_bits).bfloat16()
    d = torch.randn(shape, device=device_of_8_bits).bfloat16()
    at, d_at = site(E4M3, 16.0, device_of_8_bits), site(E5M2, 64.0, device_of_8_bits)
    rows, columns, rounded = (
        unwritten(shape, at, columns=False),
        unwritten(shape, at, rows=False),
        unwritten((shape[0], 2 * shape[1]), d_at),
    )
    swiglu.launch_product(gate_up, rows, at)
    swiglu.launch_rounded_gradients(gate_up, d, rounded, columns, at, d_at)
    gradient, product = swiglu.plain_gradients(gate_up, d)
    check_rounded(rows, plain_rounded(product, site(E4M3, 16.0, device_of_8_bits), columns=False))
    check_rounded(columns, plain_rounded(product, site(E4M3, 16.0, device_of_8_bits), rows=False))
    check_rounded(rounded, plain_rounded(gradient, site(E5M2, 64.0, device_of_8_bits)))
    assert float(at.largest.max()) == pytest.approx(float(product.abs().max()), rel=0.01)
    assert float(d_at.largest.max()) == pytest.approx(float(gradient.abs().max()), rel=0.01)
