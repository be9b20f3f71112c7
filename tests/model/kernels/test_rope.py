"""The rotation inside the merged projection: the plain definition against ``apply_rope`` and autograd, kernels against the definition."""

import pytest
import torch
from torch import Tensor

from minifoundation.model.kernels import rope
from minifoundation.model.kernels.quantise import E5M2, plain_rounded
from minifoundation.model.rope import apply_rope
from tests.model.kernels.conftest import TOLERANCE, check_rounded, relative, site, unwritten

CASES = [(64, 6, 2, 64, 32), (100, 3, 1, 48, 50), (12, 2, 2, 128, 12)]
"""Tokens, query heads, key/value heads, head width, positions."""


def values(case: tuple[int, int, int, int, int], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    N, H, K, h, R = case
    angles = torch.rand(R, h // 2, device=device) * 6
    heads = torch.randn(N, H + 2 * K, h, device=device).to(dtype)
    return heads, angles.cos(), angles.sin()


def test_the_plain_definition_is_apply_rope_and_its_gradient() -> None:
    _, H, K, h, R = case = (24, 4, 2, 16, 12)
    heads, cos, sin = (v.double() for v in values(case, torch.device("cpu"), torch.float32))
    leaf = heads.clone().requires_grad_()
    q, k, v = leaf.view(2, R, H + 2 * K, h).split([H, K, K], dim=2)
    exact = apply_rope(q, cos, sin), apply_rope(k, cos, sin), v
    d = [torch.randn(2, R, n, h).double() for n in (H, K, K)]
    (gradient,) = torch.autograd.grad(exact, leaf, d)
    turned = rope.plain_rotated_(heads.clone(), cos, sin, H + K)
    assert relative(turned.view(2, R, -1, h), torch.cat(exact, dim=2)) < 1e-12
    d_q, d_k, d_v = (x.flatten(0, 1) for x in d)
    assert relative(rope.plain_merged(d_q, d_k, d_v, cos, sin), gradient.flatten(1)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_are_the_definition(case: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    N, H, K, h, R = case
    heads, cos, sin = values(case, device, dtype)
    cos, sin = (table if N % R == 0 else table[:1].expand(N, -1).contiguous() for table in (cos, sin))
    expected = rope.plain_rotated_(heads.clone(), cos, sin, H + K)
    found = heads.clone()
    rope.launch_rotated_(found, cos, sin, H + K)
    assert relative(found, expected) < TOLERANCE[dtype] and torch.equal(found[:, H + K :], heads[:, H + K :])
    d = [torch.randn(N, n, h, device=device).to(dtype) for n in (H, K, K)]
    out = torch.full((N, (H + 2 * K) * h), torch.nan, device=device, dtype=dtype)
    rope.launch_merged(d[0], d[1], d[2], cos, sin, out, None)
    assert relative(out, rope.plain_merged(d[0], d[1], d[2], cos, sin)) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", CASES)
def test_the_merged_gradient_in_8_bits(case: tuple[int, int, int, int, int], device_of_8_bits: torch.device) -> None:
    N, H, K, h, _ = case
    _, cos, sin = values(case, device_of_8_bits, torch.bfloat16)
    d = [torch.randn(N, n, h, device=device_of_8_bits).bfloat16() for n in (H, K, K)]
    at = site(E5M2, 8.0, device_of_8_bits)
    tables = (cos, sin) if N % len(cos) == 0 else (cos[:1].expand(N, -1).contiguous(), sin[:1].expand(N, -1).contiguous())
    out = unwritten((N, (H + 2 * K) * h), at)
    rope.launch_merged(d[0], d[1], d[2], *tables, out, at)
    merged = rope.plain_merged(d[0], d[1], d[2], *tables)
    check_rounded(out, plain_rounded(merged, site(E5M2, 8.0, device_of_8_bits)))
    assert float(at.largest.max()) == pytest.approx(float(merged.abs().max()), rel=0.01)
