"""Which steps are bad: the guard against plain numpy, and a skipped step against no step at all."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minifoundation.config import TrainConfig
from minifoundation.distributed import World
from minifoundation.train.ema import Average
from minifoundation.train.guard import FLOOR, GOOD, OVERFLOW, REASONS, Guard
from minifoundation.train.optimizer import adamw, optimizer_state, restore_optimizer
from minifoundation.train.step import train_step
from tests.train.test_step import batches, made, rows

NAMES = {GOOD: "good"} | REASONS


def judged(guard: Guard, loss: float, norm: float, scale: float | None = None) -> str:
    verdict = guard.judge(torch.tensor(loss), torch.tensor(norm), None if scale is None else torch.tensor(scale))
    return NAMES[int(verdict[0])]


def expected_z(history: list[float], value: float, floor: float) -> float:
    """The definition, by numpy; of an even number the lower of the two middle values is the median."""
    ordered = np.sort(np.array(history, dtype=np.float32))
    median = ordered[(len(ordered) - 1) // 2]
    distance = np.sort(np.abs(ordered - median))
    mad = distance[(len(distance) - 1) // 2]
    return float((np.float32(value) - median) / max(1.4826 * mad, floor * abs(median)))


def test_deviations_are_those_of_the_definition_as_the_window_fills_and_wraps() -> None:
    guard, size = Guard(8.0, 16, torch.device("cpu")), 16
    draw = np.random.default_rng(0)
    kept: list[tuple[float, float]] = []
    skipped = 0
    for number in range(100):
        loss, norm = 3 + 0.1 * draw.standard_normal(), 0.5 * math.exp(0.2 * draw.standard_normal())
        if number in (30, 31, 60):
            loss += 5
        verdict, loss_z, norm_z = guard.judge(torch.tensor(loss), torch.tensor(norm), None).tolist()
        window = kept[-size:]
        if len(window) < size // 2:
            assert (verdict, loss_z, norm_z) == (GOOD, 0, 0)
        else:
            expected = [expected_z([pair[i] for pair in window], (loss, norm)[i], FLOOR[i]) for i in (0, 1)]
            assert [loss_z, norm_z] == pytest.approx(expected, rel=1e-3, abs=1e-4)
            assert (verdict == GOOD) == (max(expected) <= 8)
        skipped += verdict != GOOD
        if verdict == GOOD:
            kept.append((loss, norm))
    assert skipped == 3


@pytest.mark.parametrize(
    ("loss", "norm", "scale", "verdict"),
    [
        (3.0, 1.0, None, "good"),
        (float("nan"), 1.0, None, "loss not finite"),
        (float("inf"), float("nan"), 1024.0, "loss not finite"),
        (3.0, float("inf"), None, "gradient not finite"),
        (3.0, float("nan"), 1.0, "gradient not finite"),
        (3.0, float("inf"), 1024.0, "fp16 overflow"),
        (300.0, 1.0, None, "loss spike"),
        (300.0, 100.0, None, "loss spike"),
        (3.0, 100.0, None, "gradient spike"),
        (0.1, 0.01, None, "good"),
        (3.3, 2.5, None, "good"),
    ],
)
def test_verdicts(loss: float, norm: float, scale: float | None, verdict: str) -> None:
    guard = Guard(10.0, 16, torch.device("cpu"))
    for _ in range(10):
        judged(guard, 3.0, 1.0)
    assert judged(guard, loss, norm, scale) == verdict
    assert judged(guard, 3.0, 1.0) == "good", "what was bad is not in the window"


def test_without_spikes_only_what_is_not_finite_is_bad() -> None:
    guard = Guard(None, 16, torch.device("cpu"))
    for _ in range(10):
        judged(guard, 3.0, 1.0)
    assert judged(guard, 1e30, 1e30) == "good" and judged(guard, math.inf, 1.0) == "loss not finite"


def test_the_window_goes_on_from_its_state() -> None:
    one, two = Guard(6.0, 16, torch.device("cpu")), None
    draw = np.random.default_rng(1)
    found: list[Any] = []
    for number in range(60):
        if number == 23:
            two = Guard(6.0, 16, torch.device("cpu"), {name: value.clone() for name, value in one.state().items()})
        values = [torch.tensor(abs(draw.standard_cauchy())) for _ in range(2)]
        first = one.judge(values[0], values[1], None)
        if two is not None:
            found.append(torch.equal(first, two.judge(values[0], values[1], None)))
    assert len(found) == 37 and all(found)


@pytest.mark.parametrize("plant", [float("nan"), float("inf"), 1e4])
@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_step_is_no_step(plant: float, fused: bool) -> None:
    """Weights, moments, the optimizer's count of steps and the average, against those of a run that never saw the batch."""
    results = []
    for planted in (True, False):
        model, optimizer = made()
        if not fused:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
        average = Average(dict(model.named_parameters()), 0.9)
        guard = Guard(10.0, 16, torch.device("cpu"))
        verdicts = []
        for number in range(12):
            if number == 8 and not planted:
                continue
            weight = model.transformer.norm.weight
            before = weight.detach().clone()
            if number == 8:
                weight.data *= plant
            stats = train_step(
                model,
                optimizer,
                torch.amp.GradScaler("cpu", enabled=False),
                batches(rows(2, number), 1),
                lr=1e-3,
                grad_clip=1.0,
                tokens=64,
                world=World(),
                guard=guard,
            )
            if number == 8:
                weight.data.copy_(before)
            average.update(number + 1, stats.taken)
            verdicts.append(stats.read().verdict)
        assert [number for number, verdict in enumerate(verdicts) if verdict != GOOD] == ([8] if planted else [])
        names: dict[Tensor, str] = {weight: name for name, weight in model.named_parameters()}
        results.append({**model.state_dict(), **average.state(), **optimizer_state(optimizer, names), **guard.state()})
        assert all(float(state["step"]) == 11 for state in optimizer.state.values())
    assert results[0].keys() == results[1].keys()
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_fp16_overflow_lowers_the_scale_and_is_no_fault() -> None:
    model, optimizer = made(torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    options: dict[str, Any] = {"lr": 1e-3, "grad_clip": 1.0, "tokens": 64, "world": World()}
    stats = train_step(model, optimizer, scaler, batches(rows(2), 1), guard=Guard(10.0, 16, torch.device("cpu")), **options)
    assert stats.read().verdict == OVERFLOW and scaler.get_scale() < 2.0**60
    assert all(float(state["step"]) == 0 for state in optimizer.state.values())


def test_states_are_named_after_their_weights_and_come_back() -> None:
    model, optimizer = made()
    train_step(
        model, optimizer, torch.amp.GradScaler("cpu", enabled=False), batches(rows(2), 1), lr=1e-3, grad_clip=1.0, tokens=64, world=World()
    )
    names: dict[Tensor, str] = {weight: name for name, weight in model.transformer.named_parameters()}
    saved = {name: value.clone() for name, value in optimizer_state(optimizer, names).items()}
    assert len(saved) == 3 * len(names) and "exp_avg_sq/blocks.0.qkv.weight" in saved
    other, _ = made()
    other.load_state_dict(model.state_dict())
    fresh = adamw(dict(other.transformer.named_parameters()), TrainConfig(tokens=1))
    restore_optimizer(fresh, {weight: name for name, weight in other.transformer.named_parameters()}, saved)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), "no weight has moved"
    restored = optimizer_state(fresh, {weight: name for name, weight in other.transformer.named_parameters()})
    assert all(torch.equal(restored[name], value) for name, value in saved.items())


@pytest.mark.parametrize("steps", [5, 20, 40])
@pytest.mark.parametrize("size", [8, 16, 32])
def test_a_window_of_another_size_goes_on_from_the_last_steps(steps: int, size: int) -> None:
    draw = np.random.default_rng(0)
    seen = [(3 + 0.1 * draw.standard_normal(), 0.5 + 0.05 * draw.standard_normal()) for _ in range(steps + size)]
    before = Guard(8.0, 16, torch.device("cpu"))
    for loss, norm in seen[:steps]:
        assert judged(before, loss, norm) == "good"
    after = Guard(8.0, size, torch.device("cpu"), {name: value.clone() for name, value in before.state().items()})
    expected = Guard(8.0, size, torch.device("cpu"))
    for loss, norm in seen[max(0, steps - min(16, size)) : steps]:
        judged(expected, loss, norm)
    for loss, norm in seen[steps:]:
        one, other = (guard.judge(torch.tensor(loss), torch.tensor(norm), None) for guard in (after, expected))
        assert torch.equal(one, other)
