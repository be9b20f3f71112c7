"""The blocks that attention within documents needs are those that torch finds by looking at every place."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from minifoundation.model.kernels.flex import within_documents

TABLES = ("kv", "full_kv", "q", "full_q")


def tables(mask: BlockMask) -> dict[str, list[list[int]]]:
    """Return which blocks each table of ``mask`` lists for each row and block: what is after their number is of no account."""
    found = {}
    for name in TABLES:
        counts, indices = getattr(mask, f"{name}_num_blocks"), getattr(mask, f"{name}_indices")
        found[name] = [sorted(row[:n].tolist()) for n, row in zip(counts.flatten(), indices.flatten(0, -2), strict=True)]
    return found


@pytest.mark.parametrize(("first", "end"), [(0, 640), (0, 600), (256, 640), (200, 520), (0, 100)])
@pytest.mark.parametrize("seed", range(4))
def test_the_blocks_are_those_of_the_whole_mask(first: int, end: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    share = (0.0, 0.002, 0.01, 0.3)[seed]  # of places at which a document begins
    rows = []
    for begins in torch.rand(3, 640, generator=generator) < share:
        places = torch.arange(640)
        rows.append(places - torch.where(begins, places, 0).cummax(0).values)
    positions = torch.stack(rows)

    def seen(row: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        place = first + query
        return (place >= key) & (place - key <= positions[row, place])

    found = within_documents(positions, first, end)
    expected = create_block_mask(seen, 3, None, end - first, end, device="cpu")
    assert found.seq_lengths == expected.seq_lengths and found.BLOCK_SIZE == expected.BLOCK_SIZE
    assert tables(found) == tables(expected)
