"""How much of one kind of work went on beside another, against counting moments."""

from __future__ import annotations

import numpy as np

from minifoundation.train.breakdown import kind_of, overlap


def test_overlap_is_the_moments_that_both_have() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        some, others = ([(int(a), int(a + b)) for a, b in random.integers(1, 40, (random.integers(0, 6), 2))] for _ in range(2))
        moments = [{at for start, end in intervals for at in range(start, end)} for intervals in (some, others)]
        assert overlap(list(some), list(others)) == len(moments[0] & moments[1])


def test_kernels_between_gpus_are_communication() -> None:
    names = ("ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "ncclDevKernel_AllGather_RING_LL")
    assert {kind_of(name) for name in names} == {"communication"}
