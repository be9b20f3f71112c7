"""Initial weights: what they depend on, what they do not, and that they are normal."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch import Tensor

from minifoundation.model import initial
from minifoundation.model.initial import draw_normals


def drawn(seed: int, *shapes: tuple[int, ...], std: float = 1.0, device: str = "cpu") -> list[Tensor]:
    weights = [torch.empty(shape, device=device) for shape in shapes]
    draw_normals([(weight, std) for weight in weights], seed)
    return weights


def test_a_seed_gives_the_same_numbers_on_any_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial, "CHUNK", 1000)
    many = drawn(3, (70, 50), (30, 40))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    one = drawn(3, (70, 50), (30, 40))
    assert all(map(torch.equal, many, one))
    assert not torch.equal(drawn(4, (70, 50))[0], one[0])


def test_chunks_and_weights_are_independent_and_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the moments of the distribution, within four standard errors; equal chunks would have a correlation of 1."""
    monkeypatch.setattr(initial, "CHUNK", 50_000)
    first, second = drawn(0, (400, 500), (200, 250), std=0.5)
    parts = [*first.view(-1).split(50_000), second.view(-1)]
    for part in parts:
        error = 4 / math.sqrt(len(part))
        assert abs(float(part.mean())) < 0.5 * error and abs(float(part.std()) / 0.5 - 1) < error / math.sqrt(2)
        assert abs(float((part / 0.5).pow(4).mean()) - 3) < error * math.sqrt(96)
    correlations = torch.corrcoef(torch.stack(parts))
    assert float((correlations - torch.eye(len(parts))).abs().max()) < 5 / math.sqrt(50_000)


@pytest.mark.gpu
def test_a_gpu_gets_the_numbers_of_a_cpu() -> None:
    assert torch.equal(drawn(7, (3000, 2000), device="cuda")[0].cpu(), drawn(7, (3000, 2000))[0])
