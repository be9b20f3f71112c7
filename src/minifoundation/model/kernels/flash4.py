"""FlashAttention-4 (package flash-attn-4, kernels for Hopper and later) as an operator that torch.compile keeps whole.

Letters: B rows, T tokens a row, Q of them with queries, H query heads, K key/value heads, h head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minifoundation.model.kernels.libraries import load
from minifoundation.packages import installed

INTERFACE = "flash_attn.cute.interface"
INSTALLED = installed(INTERFACE)


@torch.library.custom_op("minifoundation::flash4", mutates_args=(), device_types="cuda")
def flash4(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return causal attention (B, Q, H, h) of q (B, Q, H, h) over k and v (B, T, K, h), and its log-sum-exp (B, H, Q) float32.

    Where there are fewer queries than keys, they are those of the last tokens.
    """
    out, log_sum_exp, *_ = load(INTERFACE)._flash_attn_fwd(q, k, v, causal=True, return_lse=True)
    return out, log_sum_exp


@torch.library.custom_op("minifoundation::flash4_gradients", mutates_args=(), device_types="cuda")
def flash4_gradients(q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    d_q, d_k, d_v = load(INTERFACE)._flash_attn_bwd(q, k, v, out, d_out.contiguous(), log_sum_exp, causal=True)
    return d_q, d_k, d_v


@flash4.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, Q, H, _h = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, Q), dtype=torch.float32)


@flash4_gradients.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_out: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor] = flash4_gradients(*ctx.saved_tensors, d_out)
    return gradients


flash4.register_autograd(_backward, setup_context=_keep)
