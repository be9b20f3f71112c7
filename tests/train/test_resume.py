"""Which settings a resumed run may change."""

from __future__ import annotations

import pytest

from minifoundation.config import RunConfig, dotted_names
from minifoundation.train.resume import FIXED, FOLLOWS, MAY_CHANGE, _may_change


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
