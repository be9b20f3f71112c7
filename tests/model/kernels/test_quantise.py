"""Rounding to 8 bits: the plain definition against float64, the kernel against the definition, byte for byte on a GPU."""

import pytest
import torch

from minifoundation.model.kernels.quantise import E4M3, E5M2, launch_rounded, plain_rounded
from tests.model.kernels.conftest import check_rounded, relative, site, unwritten

CPU = torch.device("cpu")
FORMATS = [E4M3, E5M2]
SHAPES = [(64, 128), (100, 200), (4, 3), (132, 1000)]


@pytest.mark.parametrize(("dtype", "step"), [(E4M3, 2**-4), (E5M2, 2**-3)])
def test_a_value_keeps_the_bits_of_its_format(dtype: torch.dtype, step: float) -> None:
    values = torch.randn(64, 48).exp().clamp(max=50) * torch.randn(64, 48).sign()
    at = site(dtype, 8.0, CPU)
    out = plain_rounded(values, at)
    assert out.rows is not None and out.columns is not None
    back = out.rows.double() * out.inverse.double()
    normal = values.abs() > 2**-8
    assert ((back - values).abs() <= step * values.abs())[normal].all()
    assert torch.equal(out.rows.float().T, out.columns.float())
    assert at.largest.max() == values.abs().max()


@pytest.mark.parametrize("dtype", FORMATS)
def test_what_is_too_large_becomes_the_largest_and_is_seen(dtype: torch.dtype) -> None:
    values = torch.tensor([[1e30, -1e30, 1.0, 0.0]])
    at = site(dtype, 1.0, CPU)
    out = plain_rounded(values, at, columns=False)
    assert out.rows is not None and out.rows.float().tolist() == [[at.limit, -at.limit, 1.0, 0.0]]
    assert at.largest.max() == 1e30


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("of", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 2.0**20, 2.0**-4])
def test_the_kernel_is_the_definition(
    scale: float, shape: tuple[int, int], of: torch.dtype, dtype: torch.dtype, device_of_8_bits: torch.device
) -> None:
    values = torch.randn(shape, device=device_of_8_bits).to(of)
    at, plain_at = site(dtype, scale, device_of_8_bits), site(dtype, scale, device_of_8_bits)
    for rows, columns in ((True, True), (True, False), (False, True)):
        out = unwritten(shape, at, rows=rows, columns=columns)
        launch_rounded(values, at, out)
        check_rounded(out, plain_rounded(values, plain_at, rows=rows, columns=columns))
    assert at.largest.max() == plain_at.largest.max() and relative(at.inverse, 1 / at.scale) == 0
