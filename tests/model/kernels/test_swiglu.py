"""SwiGLU's product and gradients against autograd in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minifoundation.model.kernels import swiglu
from tests.model.kernels.conftest import TOLERANCE, relative

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
    assert relative(swiglu.product(gate_up), product) < TOLERANCE[dtype]
    found, again = swiglu.gradients(gate_up, d)
    assert relative(found, gradient) < TOLERANCE[dtype] and torch.equal(again, swiglu.product(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_are_the_plain_definition(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    gate_up, d = torch.randn(shape[0], 2 * shape[1]).to(device, dtype), torch.randn(shape).to(device, dtype)
    product, gradient = exact(gate_up, d)
    found, again, d_found = torch.full_like(d, torch.nan), torch.full_like(d, torch.nan), torch.full_like(gate_up, torch.nan)
    swiglu.launch_product(gate_up, found)
    swiglu.launch_gradients(gate_up, d, d_found, again)
    assert relative(found, product) < TOLERANCE[dtype] and torch.equal(found, again)
    assert relative(d_found, gradient) < TOLERANCE[dtype]


def test_the_gated_product_keeps_gate_and_up_alone() -> None:
    """Its gradients are autograd's, and nothing else of their size is kept for the backward."""
    gate_up = torch.randn(3, 7, 2 * 40).bfloat16().requires_grad_()
    weight = torch.randn(20, 40, requires_grad=True)
    copy, d_out = weight.detach().bfloat16(), torch.randn(3, 7, 20).bfloat16()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = swiglu.gated_product(gate_up, weight, copy)
    assert {tensor.data_ptr() for tensor in kept} == {gate_up.data_ptr(), copy.data_ptr()}
    found = torch.autograd.grad(out, (gate_up, weight), d_out)
    leaves = gate_up.detach().double().requires_grad_(), copy.double().requires_grad_()
    gate, up = leaves[0].chunk(2, -1)
    reference = (F.silu(gate) * up) @ leaves[1].T
    expected = torch.autograd.grad(reference, leaves, d_out.double())
    assert relative(out, reference) < TOLERANCE[torch.bfloat16]
    assert relative(found[0], expected[0]) < TOLERANCE[torch.bfloat16]
    assert found[1].dtype == torch.float32 and relative(found[1], expected[1]) < TOLERANCE[torch.bfloat16]
