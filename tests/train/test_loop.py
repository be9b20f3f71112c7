"""The counters of a run against arithmetic by hand, with a clock that is known."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from minifoundation import runtime
from minifoundation.config import RunConfig
from minifoundation.train import loop
from minifoundation.train.run import run


class HalfASecond:
    """A clock on which every step takes half a second."""

    def __init__(self, _where: Any) -> None:
        pass

    def seconds_since(self, _earlier: HalfASecond) -> float:
        return 0.5


def test_tokens_a_second_and_mfu(settings: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    where = replace(runtime.machine(), peak_flops=1e9)
    monkeypatch.setattr(loop, "Moment", HalfASecond)
    monkeypatch.setattr(runtime, "machine", lambda _rank: where)
    config = settings()
    run(config, resume=None, dry_run=False)
    with (config.out_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    # 2 rows x 2 micro-batches x 32 tokens in half a second
    assert {row["tokens_per_second"] for row in rows} == {"256"}
    # two blocks of q, k, v (32 x 64), out (32 x 32), gate and up (32 x 128), down (64 x 32), and the head; attention over 32 tokens
    matrices = 2 * (32 * 64 + 32 * 32 + 32 * 128 + 64 * 32) + 512 * 32
    flops = 6 * matrices + 6 * 2 * 32 * 32
    assert float(rows[-1]["mfu"]) == pytest.approx(256 * flops / 1e9, rel=1e-5)
    assert [int(row["tokens"]) for row in rows] == [128 * step for step in range(1, 13)]
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
