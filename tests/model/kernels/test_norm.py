"""RMSNorm with the addition before it and its gradients: the plain definition against autograd, kernels against the definition."""

import pytest
import torch
from torch import Tensor

from minifoundation.model.kernels import norm
from minifoundation.model.kernels.quantise import E4M3, E5M2, launch_rounded, plain_rounded
from tests.model.kernels.conftest import TOLERANCE, check_rounded, relative, site, unwritten

SHAPES = [(8, 64), (100, 200), (5, 1536), (3, 48)]


def values(shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, branch, g, d_y = (torch.randn(shape, device=device).to(dtype) for _ in range(4))
    return x, branch, torch.rand(shape[1], device=device) + 0.5, g, d_y


@pytest.mark.parametrize("residual", [True, False])
def test_the_plain_definition_is_autograd(residual: bool) -> None:
    x, branch, weight, g, d_y = (v.double() for v in values((7, 40), torch.device("cpu"), torch.float32))
    total = (x + branch).requires_grad_()
    gain = weight.clone().requires_grad_()
    exact = gain * total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5)
    d, d_gain = torch.autograd.grad(exact, (total, gain), g)
    y, normed, factor = norm.plain_normed(x, branch, weight, 1e-5)
    found, found_gain, again = norm.plain_gradients(g, y, factor, weight, d_y if residual else None)
    assert relative(normed, exact) < 1e-12 and torch.equal(again, normed)
    assert relative(found, d + d_y if residual else d) < 1e-12 and relative(found_gain, d_gain) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_branch", [True, False])
def test_the_forward_kernel_is_the_definition(with_branch: bool, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x, branch, weight, _, _ = values(shape, device, dtype)
    expected = norm.plain_normed(x, branch if with_branch else None, weight, 1e-5)
    y, into, factor = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan), torch.full((shape[0],), torch.nan, device=device)
    norm.launch_normed(x, branch if with_branch else None, weight, 1e-5, y if with_branch else x, into, factor, None)
    assert relative(y if with_branch else x, expected[0]) < TOLERANCE[dtype]
    assert relative(into, expected[1]) < 2 * TOLERANCE[dtype] and relative(factor, expected[2]) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_forward_kernel_rounds_to_8_bits(shape: tuple[int, int], device_of_8_bits: torch.device) -> None:
    x, _, weight, _, _ = values(shape, device_of_8_bits, torch.bfloat16)
    at = site(E4M3, 16.0, device_of_8_bits)
    into, factor = unwritten(shape, at, columns=False), torch.empty(shape[0], device=device_of_8_bits)
    norm.launch_normed(x, None, weight, 1e-5, x, into, factor, at)
    normed = norm.plain_normed(x, None, weight, 1e-5)[1]
    check_rounded(into, plain_rounded(normed, site(E4M3, 16.0, device_of_8_bits), columns=False))
    assert float(at.largest.max()) == pytest.approx(float(normed.abs().max()), rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("residual", [True, False])
def test_the_backward_kernel_is_the_definition(residual: bool, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    x, _, weight, g, d_y = values(shape, device, dtype)
    _, _, factor = norm.plain_normed(x, None, weight, 1e-5)
    d, d_weight, again = norm.plain_gradients(g, x, factor, weight, d_y if residual else None)
    found, found_again = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    parts = torch.full((-(-shape[0] // norm.EACH), shape[1]), torch.nan, device=device)
    norm.launch_gradients(g, x, factor, weight, d_y if residual else None, found, None, found_again, parts, None)
    assert relative(found, d) < TOLERANCE[dtype] and relative(found_again, again) < 2 * TOLERANCE[dtype]
    assert relative(parts.sum(0), d_weight) < 1e-5


@pytest.mark.parametrize("shape", [(8, 64), (100, 200), (64, 1536)])
def test_the_backward_rounds_to_8_bits_in_both_layouts(shape: tuple[int, int], device_of_8_bits: torch.device) -> None:
    x, _, weight, g, d_y = values(shape, device_of_8_bits, torch.bfloat16)
    _, _, factor = norm.plain_normed(x, None, weight, 1e-5)
    d, _, again = norm.plain_gradients(g, x, factor, weight, d_y)
    at, d_at = site(E4M3, 16.0, device_of_8_bits), site(E5M2, 64.0, device_of_8_bits)
    found, rounded = torch.empty_like(x), unwritten(shape, d_at)
    parts = torch.empty(-(-shape[0] // norm.EACH), shape[1], device=device_of_8_bits)
    norm.launch_gradients(g, x, factor, weight, d_y, found, rounded, None, parts, d_at)
    launch_rounded(found, d_at._replace(watched=False), rounded._replace(rows=None))
    check_rounded(rounded, plain_rounded(d, site(E5M2, 64.0, device_of_8_bits)))
    assert float(d_at.largest.max()) == pytest.approx(float(d.abs().max()), rel=0.01)
    columns = unwritten(shape, at, rows=False)
    norm.launch_columns(x, factor, weight, columns, at)
    check_rounded(columns, plain_rounded(again, site(E4M3, 16.0, device_of_8_bits), rows=False))
