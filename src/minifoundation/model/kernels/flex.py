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
def within_rows(seq_len: int, device: torch.device) -> BlockMask:
    """Return which blocks of queries and keys causal attention over rows of ``seq_len`` tokens needs; made once a length."""
    return create_block_mask(lambda _b, _h, query, key: query >= key, None, None, seq_len, seq_len, device=device)


def within_documents(positions: Tensor) -> BlockMask:
    """Return which blocks causal attention within documents needs, given the positions (B, T) of tokens in their documents.

    A query at position p of its document sees itself and the p tokens before it.
    """

    def seen(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key <= positions[row, query])

    n_rows, seq_len = positions.shape
    make = _compiled(create_block_mask) if positions.is_cuda else create_block_mask
    mask: BlockMask = make(seen, n_rows, None, seq_len, seq_len, device=positions.device)
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
