"""FlexAttention: attention whose mask is a function of the places, compiled to one kernel that skips the blocks it hides.

Letters: B rows, T tokens a row, H query heads, K key/value heads, h head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

BLOCK = 128
"""Places to a side of the blocks that the kernel skips, or computes without asking the mask."""


@cache
def _compiled() -> Callable[..., Any]:
    """Return the kernel for static shapes: uncompiled it would hold every score.

    Not when this module is imported, since that would import the compiler into runs that do without.
    """
    return torch.compile(flex_attention, dynamic=False)


@cache
def within_rows(first: int, end: int, device: torch.device) -> BlockMask:
    """Return which blocks causal attention of the tokens from ``first`` to ``end`` of a row over all before ``end`` needs; made once."""
    return create_block_mask(lambda _b, _h, query, key: first + query >= key, None, None, end - first, end, device=device)


def within_documents(positions: Tensor, first: int, end: int) -> BlockMask:
    """Return which blocks causal attention within documents needs, given the positions (B, T) of tokens in their documents.

    Queries are those of the tokens from ``first`` to ``end`` of each row, keys those of all before ``end``. A query at position p of its
    document sees itself and the p tokens before it.
    """

    def seen(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        place = first + query
        return (place >= key) & (place - key <= positions[row, place])

    # From where documents begin, not from the mask of all places as torch has it, which is T x T or needs the compiler.
    device = positions.device
    begins = torch.arange(positions.shape[1], device=device) - positions  # of the document that a place is in, (B, T); never falls
    query, key = torch.arange(first, end, BLOCK, device=device)[:, None], torch.arange(0, end, BLOCK, device=device)
    last_query, last_key = ((x + BLOCK - 1).clamp(max=end - 1) for x in (query, key))
    earliest = torch.maximum(query, key)  # first query that the block's first key is not after
    some = (earliest <= last_query) & (begins[:, earliest.clamp(max=end - 1)] <= last_key)
    whole = (last_query - query == BLOCK - 1) & (last_key - key == BLOCK - 1)
    all_of_it = whole & (last_key <= query) & (begins[:, last_query] <= key)
    asked, not_asked = _listed((some & ~all_of_it)[:, None]), _listed(all_of_it[:, None])
    return BlockMask.from_kv_blocks(*asked, *not_asked, BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(end - first, end))


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many of the key blocks (..., Q, K) each query block needs, (..., Q), and which come first, (..., Q, K), int32."""
    return blocks.sum(-1, dtype=torch.int32), blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).int()


def flex(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask) -> Tensor:
    """Return attention (B, H, T, h) of q (B, H, T, h) over k and v (B, K, T, h) through ``blocks``.

    Off CUDA the mask is applied to all scores, uncompiled and without gradients: what the kernel is compared with.
    """
    run: Any = flex_attention
    if q.is_cuda and not torch.compiler.is_compiling():  # a block that is compiled compiles it too
        run = _compiled()
    out: Tensor = run(q, k, v, block_mask=blocks, enable_gqa=True)
    return out
