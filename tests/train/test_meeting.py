"""What processes tell each other before the first step; here they are threads."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import cast

import pytest

from minifoundation.data.loader import Loader
from minifoundation.distributed import World
from minifoundation.errors import UserError
from minifoundation.train.meeting import same_data
from tests.train.threads import threads


def loader(**shards: Sequence[str]) -> Loader:
    """Return what stands for a loader that sees ``shards`` of each source by now."""
    sources = {}
    for name, hashes in shards.items():
        pairs = [SimpleNamespace(train=SimpleNamespace(sha256=value)) for value in hashes]
        manifest = SimpleNamespace(pairs=pairs, tokenizer_sha256="t")
        sources[name] = SimpleNamespace(order=SimpleNamespace(shards=SimpleNamespace(manifest=manifest)))
    return cast(Loader, SimpleNamespace(sources=sources))


def compared(*loaders: Loader, samples: Sequence[int]) -> list[str | None]:
    """Return what each process is refused with."""

    def refused(loader: Loader, sample: int, world: World) -> str | None:
        try:
            same_data(loader, sample, world)
        except UserError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(loaders)) as pool:
        return list(pool.map(refused, loaders, samples, threads(len(loaders))))


@pytest.mark.parametrize(
    "seen",
    [
        (loader(a="123", b="45"), loader(a="12", b="45")),
        (loader(a="1", b="456"), loader(a="12", b="45")),
        (loader(a="12", b="45"), loader(a="1", b="456"), loader(a="123", b="4")),
        (loader(a="", b="4"), loader(a="1", b="")),
    ],
    ids=["one source", "one more of each", "three processes", "none yet"],
)
def test_processes_may_see_more_or_fewer_of_the_same_shards(seen: tuple[Loader, ...]) -> None:
    assert compared(*seen, samples=[7] * len(seen)) == [None] * len(seen)


@pytest.mark.parametrize(
    ("other", "sample", "named"),
    [
        (loader(a="12", b="46"), 7, "shards of b"),
        (loader(a="9", b="456"), 7, "shards of a"),
        (loader(a="1", b="456"), 8, "the next sample"),
    ],
)
def test_other_shards_and_another_place_are_refused_by_name(other: Loader, sample: int, named: str) -> None:
    refused = compared(loader(a="12", b="45"), other, samples=[7, sample])
    assert all(line is not None and line.startswith(named) for line in refused)
