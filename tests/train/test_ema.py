"""The average against its recurrence."""

import torch
from torch import nn

from minifoundation.train.ema import Average

TAKEN = torch.tensor(1.0)


def test_average_follows_the_recurrence_with_its_warm_up() -> None:
    weight = nn.Parameter(torch.zeros(3))
    average = Average({"w": weight}, decay=0.5)
    expected = torch.zeros(3)
    for step in range(1, 20):
        weight.data = torch.full((3,), float(step))
        average.update(step, TAKEN)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.data
    torch.testing.assert_close(average.state()["w"], expected)
    assert expected[0] < 19 and expected[0] > 17


def test_state_goes_on_where_it_was() -> None:
    weight = nn.Parameter(torch.randn(4))
    one = Average({"w": weight}, decay=0.9)
    for step in range(1, 4):
        one.update(step, TAKEN)
    two = Average({"w": weight}, decay=0.9, state=one.state())
    weight.data += 1
    for average in (one, two):
        average.update(4, TAKEN)
    assert torch.equal(one.state()["w"], two.state()["w"])


def test_a_skipped_step_leaves_the_average_as_it_is() -> None:
    weight = nn.Parameter(torch.randn(4))
    average = Average({"w": weight}, decay=0.9)
    before = average.state()["w"].clone()
    weight.data += 1
    average.update(1, torch.tensor(0.0))
    assert torch.equal(average.state()["w"], before)
