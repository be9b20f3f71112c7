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

from minifoundation.model.kernels import flash4

Backend = Literal["auto", "flash4", "flash", "cudnn", "efficient", "math"]
aten = torch.ops.aten

KERNEL_OPERATORS = frozenset(
    {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._flash_attention_forward.default,
        torch.ops.minifoundation.flash4.default,
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

    ``auto`` comes back only where torch has one good kernel of its own to choose: off CUDA.

    Args:
        device_type: ``torch.device.type``.
        dtype: of queries, keys and values.
        capability: CUDA compute capability of the device; unused elsewhere.
        masked: whether attention stays within documents; on CUDA that is flash's variable-length form, or math.
    """
    if backend == "math":
        return "math", None
    if device_type != "cuda":
        return "auto", None if backend == "auto" else f"{backend} needs a CUDA GPU and this is {device_type}; using torch's own choice"
    # Fastest first: cuDNN is ahead of FlashAttention 2 on Hopper and later, and not before (docs/numerics.md).
    hopper: tuple[Backend, ...] = ("flash4", "cudnn") if capability >= (9, 0) else ()
    order: tuple[Backend, ...] = (*hopper, "flash", "efficient", "math")
    usable = next(kernel for kernel in order if _obstacle(kernel, dtype, head_dim, capability, masked) is None)
    if backend == "auto":
        return usable, None
    obstacle = _obstacle(backend, dtype, head_dim, capability, masked)
    return (backend, None) if obstacle is None else (usable, f"{backend} {obstacle}; using {usable}")


def _obstacle(kernel: Backend, dtype: torch.dtype, head_dim: int, capability: tuple[int, int], masked: bool) -> str | None:
    half = dtype in (torch.float16, torch.bfloat16)
    if kernel == "math":
        return None
    if masked and kernel != "flash":
        return "cannot stay within documents"
    if kernel == "efficient":
        if not half and dtype != torch.float32:
            return f"cannot do {dtype}"
        return None if head_dim % 8 == 0 else f"needs a head width that is a multiple of 8, not {head_dim}"
    if not half:
        return f"needs bf16 or fp16, not {dtype}"
    if kernel == "flash4" and not flash4.INSTALLED:
        return "needs the package flash-attn-4"
    if kernel == "flash4" and capability[0] not in (9, 10):
        return f"needs compute capability 9.x or 10.x, not {capability[0]}.{capability[1]}"
    if capability < (8, 0):
        return f"needs compute capability 8.0, not {capability[0]}.{capability[1]}"
    widest = 256 if kernel == "flash" else 128
    if head_dim % 8 or head_dim > widest:
        return f"needs a head width that is a multiple of 8 up to {widest}, not {head_dim}"
    return None


def documents_for(kernel: Backend, cu_seqlens: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the documents in the form that ``attend`` takes for ``kernel``: offsets for flash, else what is added to scores (B, 1, T, T).

    Args:
        cu_seqlens: where each document begins in the flattened tokens, and B * T at the end, (documents + 1,) int32.
        positions: of the tokens in their documents, (B, T).
        dtype: of the queries.
    """
    if kernel == "flash":
        # Not padded to a fixed length: the kernel pays time and memory for empty documents too. Compiled once for any number of them.
        torch._dynamo.mark_dynamic(cu_seqlens, 0)
        return cu_seqlens
    places = torch.arange(positions.shape[1], device=positions.device)
    distance = places[:, None] - places  # of key from query
    hidden = (distance < 0) | (distance > positions[:, :, None])
    # Not a boolean mask: the math operator would add it as zeros and ones.
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, kernel: Backend, documents: Tensor | None = None) -> Tensor:
    """Return causal attention (B, T, H, h) of queries (B, T, H, h) over keys and values (B, T, K, h), scaled by 1/sqrt(h).

    ``kernel`` comes from ``resolve``; auto leaves the choice to torch. Query head i reads key/value head i // (H/K) (arXiv:2305.13245).

    Args:
        documents: from ``documents_for``: attention stays within them. None: within rows.
    """
    if kernel == "flash" and documents is not None:
        flat = (x.flatten(0, 1) for x in (q, k, v))  # (B * T, heads, h)
        longest = q.shape[1]
        varlen: Tensor = aten._flash_attention_forward.default(*flat, documents, documents, longest, longest, 0.0, True, False)[0]
        return varlen.view_as(q)
    if kernel == "flash4":
        out: Tensor = flash4.flash4(q, k, v)[0]
        return out
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, h)
    causal = documents is None  # the mask of documents is causal itself
    match kernel:
        case "auto":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=documents, is_causal=causal, enable_gqa=True)
        case "flash":
            out = aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, True)[0]
        case "cudnn":
            out = aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, True, 0.0, True)[0]
        case "efficient":
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            out = aten._scaled_dot_product_efficient_attention.default(q, k, v, None, True, 0.0, True)[0]
        case "math":
            out = aten._scaled_dot_product_attention_math.default(q, k, v, documents, 0.0, causal, enable_gqa=True)[0]
    return out.transpose(1, 2)
