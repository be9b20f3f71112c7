"""Numbers with the nouns they count, and as people say them."""

from __future__ import annotations

import pytest

from minifoundation.wording import counted, short_bytes, short_count


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


def test_numbers_as_people_say_them() -> None:
    assert [short_bytes(size) for size in (7, 4_321, 34_512_345, 1.2e12)] == ["7 B", "4.32 kB", "34.5 MB", "1.2 TB"]
    assert [short_count(value) for value in (7, 1_500_000, 2e8, 1e10)] == ["7", "1.5M", "200M", "10B"]
