"""Causal grouped-query attention; the one place that names attention kernels.

Letters: B rows, T tokens a row, Q of them with queries here, H query heads, K key/value heads, h head width.

Backends are called by their own operators, not through ``scaled_dot_product_attention`` under backend flags: torch's compile caches do
not key on those flags, and activation checkpointing would recompute after the flags are gone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from minifoundation.model.kernels import flash4, flex, language

Backend = Literal["auto", "flash4", "flash", "cudnn", "flex", "efficient", "math"]
Mask = Tensor | BlockMask
"""What a kernel is told of the tokens that each token sees, in the form that it takes."""


class Context(Protocol):
    """The models that read a row together, each some chunks of it (context parallelism), as one of them sees it."""

    size: int
    """How many they are: each has the same share of a row."""

    def chunks(self, seq_len: int) -> Sequence[tuple[int, int]]:
        """Return where in a row of ``seq_len`` tokens those that are here begin and end, chunk by chunk in their order here."""
        ...

    def gathered(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values (B, T, K, h) of whole rows, in order, from those of the tokens that are here; differentiable."""
        ...


class Chunk(NamedTuple):
    """Tokens ``first`` to ``end`` - 1 of each row, and what of the keys up to ``end`` they see."""

    first: int
    end: int
    mask: Mask | None


class Chunks(NamedTuple):
    """What ``attend`` takes where queries are those of some chunks of a row, and keys and values those of all of it."""

    chunks: tuple[Chunk, ...]
    context: Context


aten = torch.ops.aten

KERNEL_OPERATORS = frozenset(
    {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._efficient_attention_forward.default,
        aten._flash_attention_forward.default,
        torch.ops.minifoundation.flash4.default,
        torch.ops.higher_order.flex_attention,
    }
)
"""The operators whose outputs selective activation checkpointing keeps."""

LOWER_RIGHT = 2
"""The causal mask of the memory-efficient operator whose last query sees the last key (``torch.nn.attention.bias.CausalVariant``)."""


def resolve(
    backend: Backend,
    device_type: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 64,
    capability: tuple[int, int] = (9, 0),
    masked: bool = False,
    chunked: bool = False,
) -> tuple[Backend, str | None]:
    """Return the kernel that runs for the setting ``model.attention``, and one line of reason when it is not the one asked for.

    For ``auto`` that is the first of ``candidates``: what runs where nothing was measured.

    Args:
        device_type: ``torch.device.type``.
        dtype: of queries, keys and values.
        capability: CUDA compute capability of the device; unused elsewhere.
        masked: whether attention stays within documents.
        chunked: whether queries are those of some chunks of a row.
    """
    if backend == "math":
        return "math", None
    if device_type != "cuda":
        return "auto", None if backend == "auto" else f"{backend} needs a CUDA GPU and this is {device_type}; using torch's own choice"
    usable = candidates(device_type, dtype=dtype, head_dim=head_dim, capability=capability, masked=masked, chunked=chunked)[0]
    if backend == "auto":
        return usable, None
    obstacle = _obstacle(backend, dtype, head_dim, capability, masked, chunked)
    return (backend, None) if obstacle is None else (usable, f"{backend} {obstacle}; using {usable}")


def candidates(
    device_type: str, *, dtype: torch.dtype, head_dim: int, capability: tuple[int, int], masked: bool = False, chunked: bool = False
) -> tuple[Backend, ...]:
    """Return the kernels that can run, the one that is fastest by experience first; arguments as those of ``resolve``.

    ``auto`` stands for torch's own choice, off CUDA.
    """
    if device_type != "cuda":
        return ("auto", "math")
    # cuDNN is ahead of FlashAttention 2 on Hopper and later, and not before (docs/numerics.md).
    half: tuple[Backend, ...] = ("flash4", "cudnn", "flash") if capability >= (9, 0) else ("flash", "cudnn")
    order: tuple[Backend, ...] = (*half, "flex", "efficient", "math")
    return tuple(kernel for kernel in order if _obstacle(kernel, dtype, head_dim, capability, masked, chunked) is None)


def _obstacle(kernel: Backend, dtype: torch.dtype, head_dim: int, capability: tuple[int, int], masked: bool, chunked: bool) -> str | None:
    half = dtype in (torch.float16, torch.bfloat16)
    if kernel == "math":
        return None
    if masked and kernel not in ("flash", "flex"):
        return "cannot stay within documents"
    if chunked and kernel == "cudnn":  # torch's operator aligns the causal mask to the first key
        return "cannot read a row in chunks"
    if kernel == "efficient":
        if not half and dtype != torch.float32:
            return f"cannot do {dtype}"
        return None if head_dim % 8 == 0 else f"needs a head width that is a multiple of 8, not {head_dim}"
    if not half:
        return f"needs bf16 or fp16, not {dtype}"
    if kernel == "flash4" and not flash4.INSTALLED:
        return "needs the package flash-attn-4"
    if kernel == "flex" and not language.INSTALLED:
        return "needs Triton"
    if kernel == "flash4" and capability[0] not in (9, 10):
        return f"needs compute capability 9.x or 10.x, not {capability[0]}.{capability[1]}"
    if capability < (8, 0):
        return f"needs compute capability 8.0, not {capability[0]}.{capability[1]}"
    if kernel == "flex":
        return None if head_dim in (16, 32, 64, 128, 256) else f"needs a head width of 16, 32, 64, 128 or 256, not {head_dim}"
    widest = 256 if kernel == "flash" else 128
    if head_dim % 8 or head_dim > widest:
        return f"needs a head width that is a multiple of 8 up to {widest}, not {head_dim}"
    return None


def rows_for(kernel: Backend, tokens: Tensor, context: Context | None = None) -> Mask | Chunks | None:
    """Return what ``attend`` takes for attention within rows, of which ``tokens`` (B, T here) are here: blocks for flex, else None.

    Args:
        context: who has the rest of the rows; None: they are here as a whole.
    """

    def mask(first: int, end: int) -> Mask | None:
        return flex.within_rows(first, end, tokens.device) if kernel == "flex" else None

    if context is None:
        return mask(0, tokens.shape[1])
    return Chunks(tuple(Chunk(first, end, mask(first, end)) for first, end in context.chunks(context.size * tokens.shape[1])), context)


def documents_for(
    kernel: Backend, cu_seqlens: Tensor, positions: Tensor, dtype: torch.dtype, context: Context | None = None
) -> Mask | Chunks:
    """Return the documents in the form that ``attend`` takes: offsets for flash, blocks for flex, else added to scores (B, 1, T, T).

    Args:
        cu_seqlens: where each document begins in the flattened tokens of whole rows, and B * T at the end, (documents + 1,) int32.
        positions: of these tokens in their documents, (B, T).
        dtype: of the queries.
        context: who has the rest of the rows; None: they are here as a whole.
    """

    def mask(first: int, end: int) -> Mask:
        if kernel == "flash":
            offsets = _offsets(cu_seqlens, positions.shape[1], first, end)
            # Not padded to a fixed length: the kernel pays time and memory for empty documents too. Compiled once for any number of them.
            torch._dynamo.mark_dynamic(offsets, 1)
            return offsets
        if kernel == "flex":
            return flex.within_documents(positions, first, end)
        places = torch.arange(end, device=positions.device)
        distance = places[first:, None] - places  # of key from query
        hidden = (distance < 0) | (distance > positions[:, first:end, None])
        # Not a boolean mask: the math operator would add it as zeros and ones.
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))[:, None]

    if context is None:
        return mask(0, positions.shape[1])
    return Chunks(tuple(Chunk(first, end, mask(first, end)) for first, end in context.chunks(positions.shape[1])), context)


def _offsets(cu_seqlens: Tensor, seq_len: int, first: int, end: int) -> Tensor:
    """Return where each document begins among the queries from ``first`` to ``end`` and among the keys before ``end``, (2, documents + 1).

    A document that has ended before has keys and no query, one that begins later neither.
    """
    if (first, end) == (0, seq_len):
        return torch.stack((cu_seqlens, cu_seqlens))
    begins = cu_seqlens[:-1] % seq_len
    ends = (begins + cu_seqlens.diff()).clamp(max=end)
    lengths = torch.stack((ends - begins.clamp(min=first), ends - begins)).clamp(min=0)
    return F.pad(lengths.cumsum(1, dtype=torch.int32), (1, 0))


def attend(q: Tensor, k: Tensor, v: Tensor, kernel: Backend, mask: Mask | Chunks | None = None) -> Tensor:
    """Return causal attention (B, Q, H, h) of queries (B, Q, H, h) over keys and values (B, T, K, h), scaled by 1/sqrt(h).

    ``kernel`` comes from ``resolve``; auto leaves the choice to torch. Query head i reads key/value head i // (H/K) (arXiv:2305.13245).
    Where there are fewer queries than keys they are those of the last tokens, or, with ``Chunks``, of these.

    Args:
        mask: from ``documents_for``: attention stays within them. From ``rows_for``, or None: within rows.
    """
    if isinstance(mask, Chunks):
        parts = q.split([end - first for first, end, _ in mask.chunks], dim=1)
        return torch.cat(
            [attend(part, k[:, :end], v[:, :end], kernel, seen) for part, (_, end, seen) in zip(parts, mask.chunks, strict=True)], dim=1
        )
    n_queries, n_keys = q.shape[1], k.shape[1]
    if kernel == "flash" and isinstance(mask, Tensor):
        flat = (x.flatten(0, 1) for x in (q, k, v))  # (B * T, heads, h)
        varlen: Tensor = aten._flash_attention_forward.default(*flat, mask[0], mask[1], n_queries, n_keys, 0.0, True, False)[0]
        return varlen.view_as(q)
    if kernel == "flash4":
        out: Tensor = flash4.flash4(q, k, v)[0]
        return out
    if kernel == "efficient" and n_queries < n_keys:
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
        nothing = (None,) * 5  # bias, offsets and lengths of documents
        late: Tensor = aten._efficient_attention_forward.default(q, k, v, *nothing, 0.0, LOWER_RIGHT, True)[0]
        return late
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, h)
    if kernel == "flex":
        blocks = mask if isinstance(mask, BlockMask) else flex.within_rows(n_keys - n_queries, n_keys, q.device)
        return flex.flex(q, k, v, blocks).transpose(1, 2)
    added = mask if isinstance(mask, Tensor) else None
    if added is None and n_queries < n_keys and kernel in ("auto", "math"):  # they take the queries for those of the first tokens
        hidden = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).triu(n_keys - n_queries + 1)
        added = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
    causal = added is None  # what is added is causal itself
    match kernel:
        case "auto":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, is_causal=causal, enable_gqa=True)
        case "flash":  # like FlashAttention 4, it takes the queries for those of the last tokens
            out = aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, True)[0]
        case "cudnn":
            out = aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, True, 0.0, True)[0]
        case "efficient":
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            out = aten._scaled_dot_product_efficient_attention.default(q, k, v, None, True, 0.0, True)[0]
        case "math":
            out = aten._scaled_dot_product_attention_math.default(q, k, v, added, 0.0, causal, enable_gqa=True)[0]
    return out.transpose(1, 2)


def keys_and_values(k: Tensor, v: Tensor, mask: Mask | Chunks | None) -> tuple[Tensor, Tensor]:
    """Return the keys and values that ``attend`` takes with ``mask``, from those of the tokens that are here."""
    return mask.context.gathered(k, v) if isinstance(mask, Chunks) else (k, v)
