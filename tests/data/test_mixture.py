"""Sources dealt out by weight against counting them one by one."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from minifoundation.data.mixture import Mixture

weights = st.lists(
    st.one_of(st.floats(1e-6, 1e6), st.integers(1, 9).map(float), st.sampled_from([0.1, 0.2, 0.8, 1 / 3])), min_size=1, max_size=9
)


@settings(deadline=None)
@given(weights=weights)
def test_every_sample_of_every_source_comes_once_and_in_order(weights: list[float]) -> None:
    mixture = Mixture(weights)
    seen: Counter[int] = Counter()
    for sample in range(300):
        assert mixture.counts(sample) == [seen[source] for source in range(len(weights))]
        source, number = mixture.place(sample)
        assert number == seen[source]
        seen[source] += 1


@settings(deadline=None)
@given(weights=weights, samples=st.integers(0, 10**13))
def test_every_prefix_holds_the_shares_to_a_bounded_count(weights: list[float], samples: int) -> None:
    mixture = Mixture(weights)
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    counts = mixture.counts(samples)
    assert sum(counts) == samples
    bound = Fraction(math.ceil(math.log2(len(weights))), 2)
    assert all(abs(count - share * samples) <= bound for count, share in zip(counts, shares, strict=True))


@settings(deadline=None)
@given(weights=weights, sample=st.integers(0, 10**13))
def test_a_place_is_the_count_before_it(weights: list[float], sample: int) -> None:
    mixture = Mixture(weights)
    before, after = mixture.counts(sample), mixture.counts(sample + 1)
    source, number = mixture.place(sample)
    assert number == before[source]
    assert [b - a for a, b in zip(before, after, strict=True)] == [int(one == source) for one in range(len(weights))]


def test_four_fifths_and_one_fifth_by_hand() -> None:
    mixture = Mixture([0.8, 0.2])
    assert [mixture.place(sample)[0] for sample in range(10)] == [0, 0, 1, 0, 0] * 2
    assert mixture.counts(10**12) == [8 * 10**11, 2 * 10**11]


def test_one_source_has_all() -> None:
    assert [Mixture([0.3]).place(sample) for sample in range(3)] == [(0, 0), (0, 1), (0, 2)]
