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

Backend = Literal["auto", "flash", "cudnn", "efficient", "math"]
aten = torch.ops.aten

KERNEL_OPERATORS = frozenset(
    {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
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
) -> tuple[Backend, str | None]:
    """Return the kernel that runs for the setting ``model.attention``, and one line of reason when it is not the one asked for.

    ``auto`` comes back only where torch has one good kernel of its own to choose: off CUDA.

    Args:
        device_type: ``torch.device.type``.
        dtype: of queries, keys and values.
        capability: CUDA compute capability of the device; unused elsewhere.
    """
    if backend == "math":
        return "math", None
    if device_type != "cuda":
        return "auto", None if backend == "auto" else f"{backend} needs a CUDA GPU and this is {device_type}; using torch's own choice"
    # Fastest first: cuDNN is ahead of FlashAttention 2 on Hopper and later, and not before (docs/numerics.md).
    order: tuple[Backend, ...] = ("cudnn", "flash", "efficient", "math") if capability >= (9, 0) else ("flash", "efficient", "math")
    usable = next(kernel for kernel in order if _obstacle(kernel, dtype, head_dim, capability) is None)
    if backend == "auto":
        return usable, None
    obstacle = _obstacle(backend, dtype, head_dim, capability)
    return (backend, None) if obstacle is None else (usable, f"{backend} {obstacle}; using {usable}")


def _obstacle(kernel: Backend, dtype: torch.dtype, head_dim: int, capability: tuple[int, int]) -> str | None:
    half = dtype in (torch.float16, torch.bfloat16)
    if kernel == "math":
        return None
    if kernel == "efficient":
        if not half and dtype != torch.float32:
            return f"cannot do {dtype}"
        return None if head_dim % 8 == 0 else f"needs a head width that is a multiple of 8, not {head_dim}"
    if not half:
        return f"needs bf16 or fp16, not {dtype}"
    if capability < (8, 0):
        return f"needs compute capability 8.0, not {capability[0]}.{capability[1]}"
    widest = 128 if kernel == "cudnn" else 256
    if head_dim % 8 or head_dim > widest:
        return f"needs a head width that is a multiple of 8 up to {widest}, not {head_dim}"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, kernel: Backend) -> Tensor:
    """Return causal attention (B, T, H, h) of queries (B, T, H, h) over keys and values (B, T, K, h), scaled by 1/sqrt(h).

    ``kernel`` comes from ``resolve``; auto leaves the choice to torch. Query head i reads key/value head i // (H/K) (arXiv:2305.13245).
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, h)
    match kernel:
        case "auto":
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        case "flash":
            out = aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, True)[0]
        case "cudnn":
            out = aten._scaled_dot_product_cudnn_attention.default(q, k, v, None, True, 0.0, True)[0]
        case "efficient":
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
            out = aten._scaled_dot_product_efficient_attention.default(q, k, v, None, True, 0.0, True)[0]
        case "math":
            out = aten._scaled_dot_product_attention_math.default(q, k, v, None, 0.0, True, enable_gqa=True)[0]
    return out.transpose(1, 2)
