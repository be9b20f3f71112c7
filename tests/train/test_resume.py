"""Which settings a resumed run may change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minifoundation.checkpoint import Checkpoint
from minifoundation.config import RunConfig, dotted_names
from minifoundation.distributed import World
from minifoundation.train.parallel import accumulated, as_asked
from minifoundation.train.plan import plan
from minifoundation.train.resume import FIXED, FOLLOWS, MAY_CHANGE, _may_change, refuse_another_run
from minifoundation.train.state import Progress


def test_what_is_told_apart_are_settings_there_are() -> None:
    names = dotted_names(RunConfig)
    for name in (*MAY_CHANGE, *FIXED, *FOLLOWS):
        assert any(one.startswith(name) for one in names) if name.endswith(".") else name in names, name
    assert not [name for name in FIXED if _may_change(name)] and all(_may_change(name) for name in FOLLOWS)


@pytest.mark.parametrize("name", ["train.keep", "train.keep_every", "eval.tasks"])
def test_these_may_change(name: str) -> None:
    assert _may_change(name)


@pytest.mark.parametrize("name", ["train.lr", "train.keep_going", "evaluation"])
def test_these_may_not_whatever_they_begin_with(name: str) -> None:
    assert not _may_change(name)


@pytest.mark.parametrize(("rows", "told"), [(2, []), (1, ["changed since a: train.batch_size 1 instead of 2"])])
def test_micro_batches_that_follow_from_the_tokens_of_a_step_are_no_change(
    settings: Callable[..., RunConfig], rows: int, told: list[str]
) -> None:
    asked = settings(train={"tokens_per_step": 256, "grad_accum": 1})
    moments: Any = {"exp_avg/norm.weight": None}
    progress = Progress(step=3, samples_per_step=8).as_dict()
    before = Checkpoint(as_asked(accumulated(asked, World())), {}, b"", progress, optimizer=moments)
    now = accumulated(asked.replaced(train={"batch_size": rows}), World())
    said: list[str] = []
    refuse_another_run(before, now, (), plan(now, 1), Path("a"), said.append)
    assert said == [*told, "continuing from a at step 3 of 6"]
