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


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``function`` compiled for static shapes: uncompiled, attention holds every score, and making a mask every place of it.

    Not when this module is imported, since that would import the compiler into runs that do without.
    """
    return torch.compile(function, dynamic=False)


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

    make = _compiled(create_block_mask) if positions.is_cuda else create_block_mask
    mask: BlockMask = make(seen, len(positions), None, end - first, end, device=positions.device)
    return mask


def flex(q: Tensor, k: Tensor, v: Tensor, blocks: BlockMask) -> Tensor:
    """Return attention (B, H, T, h) of q (B, H, T, h) over k and v (B, K, T, h) through ``blocks``.

    Off CUDA the mask is applied to all scores, uncompiled and without gradients: what the kernel is compared with.
    """
    run: Any = flex_attention
    if q.is_cuda and not torch.compiler.is_compiling():  # a block that is compiled compiles it too
        run = _compiled(flex_attention)
    out: Tensor = run(q, k, v, block_mask=blocks, enable_gqa=True)
    return out
