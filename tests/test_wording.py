"""Numbers with the nouns they count."""

from __future__ import annotations

import pytest

from minifoundation.wording import counted


@pytest.mark.parametrize(
    ("number", "many", "expected"),
    [
        (0, None, "0 shards"),
        (1, None, "1 shard"),
        (2, None, "2 shards"),
        (1234, None, "1,234 shards"),
        (1, "x", "1 shard"),
        (5, "x", "5 x"),
    ],
)
def test_one_is_singular_and_any_other_number_plural(number: int, many: str | None, expected: str) -> None:
    assert counted(number, "shard", many) == expected
