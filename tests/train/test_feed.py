"""What processes that wait for data tell each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from minifoundation.distributed import World
from minifoundation.errors import UserError
from minifoundation.train.feed import Feed, NoData
from tests.train.threads import threads


@pytest.mark.parametrize("failing", [0, 1])
def test_what_ends_the_data_on_one_process_is_told_once(failing: int) -> None:
    """Not that another process cannot go on, by each of the others."""

    def ends(world: World) -> Any:
        supply: Any = SimpleNamespace(fault=lambda: UserError("data", "is gone", "look for it") if world.rank == failing else None)
        training: Any = SimpleNamespace(world=world, supply=supply, machine=SimpleNamespace(device="cpu"))
        with pytest.raises(NoData) as caught:
            Feed(training, lambda: False, bar=SimpleNamespace())._agreed(lambda: 0, 1)  # type: ignore[arg-type]
        assert caught.value.everywhere
        return caught.value.error

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(ends, threads(2)))
    assert [str(error) for error in found] == ["data: is gone; look for it"] * 2
