"""Scales of 8-bit tensors: powers of two with room above all that was seen, the same after a checkpoint."""

import math

import pytest
import torch

from minifoundation.config import ModelConfig
from minifoundation.data.batch import Batch
from minifoundation.distributed import World
from minifoundation.model.fp8 import FORMATS, HEADROOM, HISTORY, Scales
from minifoundation.model.kernels.quantise import E4M3, E5M2
from minifoundation.model.training import TrainingModel
from minifoundation.model.transformer import Transformer
from minifoundation.train.step import settle
from tests.model.test_fused import SMALL, TOKENS


def seen(scales: Scales, value: float) -> None:
    """Have every site meet ``value``."""
    scales.largest[:, 3] = value


@pytest.mark.parametrize("value", [1e-6, 0.3, 1.0, 7.5, 300.0])
def test_a_scale_is_the_largest_power_of_two_that_leaves_room(value: float) -> None:
    scales = Scales(2)
    seen(scales, value)
    scales.update()
    for site, scale in zip((*FORMATS * 2, E4M3), scales.scale[:, 0].tolist(), strict=True):
        limit = torch.finfo(site).max / HEADROOM[site]
        assert math.log2(scale).is_integer() and scale * value <= limit < 2 * scale * value
    assert torch.equal(scales.inverse, 1 / scales.scale) and not scales.largest.any()


def test_the_largest_of_the_last_steps_counts_and_then_is_forgotten() -> None:
    scales = Scales(1)
    seen(scales, 100.0)
    scales.update()
    high = scales.scale.clone()
    for _ in range(HISTORY - 1):
        seen(scales, 1.0)
        scales.update()
        assert torch.equal(scales.scale, high)
    seen(scales, 1.0)
    scales.update()
    assert (scales.scale > 32 * high).all()


def test_what_is_cut_off_is_counted_and_what_is_not_finite_is_not_taken_in() -> None:
    scales = Scales(1)
    for _ in range(2):  # the first scales of gradients foresee smaller ones
        seen(scales, 1.0)
        cut_off = scales.update()
    assert cut_off == 0
    before = scales.scale.clone()
    scales.largest[0, 0], scales.largest[5, 0] = 1e4, 1e9
    assert scales.update() == 2
    assert scales.scale[0, 0] < before[0, 0] and scales.scale[5, 0] < before[5, 0]
    before = scales.scale.clone()
    seen(scales, float("inf"))
    scales.update()
    assert torch.equal(scales.scale, before) and scales.scale.isfinite().all()


def test_a_site_that_met_nothing_keeps_its_scale() -> None:
    scales = Scales(1)
    before = scales.scale.clone()
    scales.update()
    assert torch.equal(scales.scale, before)


def test_they_go_on_from_their_state() -> None:
    one, two = Scales(2), Scales(2)
    for value in (3.0, 0.01, 40.0):
        seen(one, value)
        one.update()
    two.load({name: tensor.clone() for name, tensor in one.state().items()})
    assert two.settled
    for value in (5.0, 0.2):
        for scales in (one, two):
            seen(scales, value)
            scales.update()
        assert torch.equal(one.scale, two.scale) and torch.equal(one.inverse, two.inverse)


def test_a_run_that_had_no_scales_leaves_them_to_be_found() -> None:
    scales = Scales(2)
    scales.load({})
    assert not scales.settled


def test_products_want_each_scale_at_a_multiple_of_16_bytes() -> None:
    sites = Scales(2).sites(1, watched=True)
    assert all(site is not None and site.scale.data_ptr() % 16 == 0 and site.inverse.data_ptr() % 16 == 0 for site in sites)
    assert [site.dtype for site in sites if site is not None] == [E4M3] * 4 + [E5M2] * 4


def test_settling_finds_scales_and_changes_nothing_else() -> None:
    transformer = Transformer(ModelConfig.model_validate(SMALL), dtype=torch.bfloat16, fp8=True)
    transformer.initialise(0)
    model, scales = TrainingModel(transformer, z_loss=1e-4, chunk=48), transformer.scales
    assert scales is not None
    weights = {name: weight.clone() for name, weight in transformer.named_parameters()}
    batch = Batch(TOKENS, TOKENS)
    settle(model, scales, batch, tokens=TOKENS.numel(), world=World())
    found = scales.scale.clone()
    assert all(torch.equal(weight, weights[name]) and weight.grad is None for name, weight in transformer.named_parameters())
    settle(model, scales, batch, tokens=TOKENS.numel(), world=World())
    assert torch.equal(scales.scale, found), "once settled, only steps move them"
    model(TOKENS, TOKENS).total.div(TOKENS.numel()).backward()
    assert scales.update() == 0, "nothing of the same batch is cut off"
