"""Causal grouped-query attention; the one place that names attention kernels.

Letters: B rows, T tokens a row, H query heads, K key/value heads, h head width.

Backends are called by their own operators, not through ``scaled_dot_product_attention`` under backend flags: torch's compile caches do
not key on those flags, and activation checkpointing would recompute after the flags are gone.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from minifoundation.model.kernels import flash4, flex, language

Backend = Literal["auto", "flash4", "flash", "cudnn", "flex", "efficient", "math"]
Mask = Tensor | BlockMask
"""What a kernel is told of the tokens that each token sees, in the form that it takes."""

aten = torch.ops.aten

KERNEL_OPERATORS = frozenset(
    {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._flash_attention_forward.default,
        torch.ops.minifoundation.flash4.default,
        torch.ops.higher_order.flex_attention,
    }
)
"""The operators whose outputs selective activation checkpointing keeps."""


def resolve(
    backend: Backend,
    device_type: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 64,
    capability: tuple[int, int] = (9, 0),
    masked: bool = False,
) -> tuple[Backend, str | None]:
    """Return the kernel that runs for the setting ``model.attention``, and one line of reason when it is not the one asked for.

    For ``auto`` that is the first of ``candidates``: what runs where nothing was measured.

    Args:
        device_type: ``torch.device.type``.
        dtype: of queries, keys and values.
        capability: CUDA compute capability of the device; unused elsewhere.
        masked: whether attention stays within documents.
    """
    if backend == "math":
        return "math", None
    if device_type != "cuda":
        return "auto", None if backend == "auto" else f"{backend} needs a CUDA GPU and this is {device_type}; using torch's own choice"
    usable = candidates(device_type, dtype=dtype, head_dim=head_dim, capability=capability, masked=masked)[0]
    if backend == "auto":
        return usable, None
    obstacle = _obstacle(backend, dtype, head_dim, capability, masked)
    return (backend, None) if obstacle is None else (usable, f"{backend} {obstacle}; using {usable}")


def candidates(
    device_type: str, *, dtype: torch.dtype, head_dim: int, capability: tuple[int, int], masked: bool = False
) -> tuple[Backend, ...]:
    """Return the kernels that can run, the one that is fastest by experience first; arguments as those of ``resolve``.

    ``auto`` stands for torch's own choice, off CUDA.
    """
    if device_type != "cuda":
        return ("auto", "math")
    # cuDNN is ahead of FlashAttention 2 on Hopper and later, and not before (docs/numerics.md).
    half: tuple[Backend, ...] = ("flash4", "cudnn", "flash") if capability >= (9, 0) else ("flash", "cudnn")
    order: tuple[Backend, ...] = (*half, "flex", "efficient", "math")
    return tuple(kernel for kernel in order if _obstacle(kernel, dtype, head_dim, capability, masked) is None)


def _obstacle(kernel: Backend, dtype: torch.dtype, head_dim: int, capability: tuple[int, int], masked: bool) -> str | None:
    half = dtype in (torch.float16, torch.bfloat16)
    if kernel == "math":
        return None
    if masked and kernel not in ("flash", "flex"):
        return "cannot stay within documents"
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


def rows_for(kernel: Backend, tokens: Tensor) -> Mask | None:
    """Return what ``attend`` takes for attention within the rows of ``tokens`` (B, T): blocks for flex, None for the others."""
    return flex.within_rows(tokens.shape[1], tokens.device) if kernel == "flex" else None


def documents_for(kernel: Backend, cu_seqlens: Tensor, positions: Tensor, dtype: torch.dtype) -> Mask:
    """Return the documents in the form that ``attend`` takes: offsets for flash, blocks for flex, else added to scores (B, 1, T, T).

    Args:
        cu_seqlens: where each document begins in the flattened tokens, and B * T at the end, (documents + 1,) int32.
        positions: of the tokens in their documents, (B, T).
        dtype: of the queries.
    """
    if kernel == "flash":
        # Not padded to a fixed length: the kernel pays time and memory for empty documents too. Compiled once for any number of them.
        torch._dynamo.mark_dynamic(cu_seqlens, 0)
        return cu_seqlens
    if kernel == "flex":
        return flex.within_documents(positions)
    places = torch.arange(positions.shape[1], device=positions.device)
    distance = places[:, None] - places  # of key from query
    hidden = (distance < 0) | (distance > positions[:, :, None])
    # Not a boolean mask: the math operator would add it as zeros and ones.
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, kernel: Backend, mask: Mask | None = None) -> Tensor:
    """Return causal attention (B, T, H, h) of queries (B, T, H, h) over keys and values (B, T, K, h), scaled by 1/sqrt(h).

    ``kernel`` comes from ``resolve``; auto leaves the choice to torch. Query head i reads key/value head i // (H/K) (arXiv:2305.13245).

    Args:
        mask: from ``documents_for``: attention stays within them. From ``rows_for``, or None: within rows.
    """
    if kernel == "flash" and isinstance(mask, Tensor):
        flat = (x.flatten(0, 1) for x in (q, k, v))  # (B * T, heads, h)
        longest = q.shape[1]
        varlen: Tensor = aten._flash_attention_forward.default(*flat, mask, mask, longest, longest, 0.0, True, False)[0]
        return varlen.view_as(q)
    if kernel == "flash4":
        out: Tensor = flash4.flash4(q, k, v)[0]
        return out
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, h)
    if kernel == "flex":
        blocks = mask if isinstance(mask, BlockMask) else flex.within_rows(q.shape[2], q.device)
        return flex.flex(q, k, v, blocks).transpose(1, 2)
    added = mask if isinstance(mask, Tensor) else None
    causal = added is None  # the mask of documents is causal itself
    match kernel:
        case "auto":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, is_causal=causal, enable_gqa=True)
        case "flash":
            out = aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, True)[0]
        case "cudnn":
            out = aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, True, 0.0, True)[0]
        case "efficient":
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            out = aten._scaled_dot_product_efficient_attention.default(q, k, v, None, True, 0.0, True)[0]
        case "math":
            out = aten._scaled_dot_product_attention_math.default(q, k, v, added, 0.0, causal, enable_gqa=True)[0]
    return out.transpose(1, 2)
