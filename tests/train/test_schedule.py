"""The rates against the closed formulas of the papers."""

import math
from itertools import pairwise

import pytest

from minifoundation.config import TrainConfig
from minifoundation.train.schedule import learning_rate, warmup_steps


def config(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate({"tokens": 1, "lr": 1e-3, "warmup": 0.1, "min_lr": 0.1, **changes})


def test_warmup_rises_in_equal_parts_and_the_first_update_is_not_lost() -> None:
    rates = [learning_rate(step, 100, config()) for step in range(10)]
    assert rates == pytest.approx([1e-4 * (n + 1) for n in range(10)])


def test_cosine_is_the_formula_and_ends_at_min_lr() -> None:
    for step in range(10, 100):
        done = (step - 10) / 89
        assert learning_rate(step, 100, config()) == pytest.approx(1e-4 + 9e-4 * (1 + math.cos(math.pi * done)) / 2)
    assert learning_rate(99, 100, config()) == pytest.approx(1e-4)


def test_constant_stays() -> None:
    assert {learning_rate(step, 100, config(schedule="constant")) for step in range(10, 100)} == {1e-3}


def test_wsd_is_flat_then_a_line_to_min_lr() -> None:
    rates = [learning_rate(step, 100, config(schedule="wsd", decay=0.2)) for step in range(100)]
    assert set(rates[10:80]) == {1e-3}
    drops = [a - b for a, b in pairwise(rates[79:])]
    assert drops == pytest.approx([9e-4 / 20] * 20)
    assert rates[-1] == pytest.approx(1e-4)


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_tiny_runs_have_positive_rates(schedule: str, steps: int) -> None:
    rates = [learning_rate(step, steps, config(schedule=schedule)) for step in range(steps)]
    assert all(0 < rate <= 1e-3 for rate in rates)


def test_a_share_is_what_its_decimals_say() -> None:
    assert warmup_steps(config(warmup=0.07), 100) == 7, "0.07 * 100 is 7.000000000000001 in binary"
    assert warmup_steps(config(warmup=0.07), 101) == 8
    rates = [learning_rate(step, 100, config(schedule="wsd", warmup=0, decay=0.07)) for step in range(100)]
    assert sum(rate < 1e-3 for rate in rates) == 7


def test_warmup_can_be_off() -> None:
    assert warmup_steps(config(warmup=0), 100) == 0
    assert learning_rate(0, 100, config(warmup=0)) == pytest.approx(1e-3)
