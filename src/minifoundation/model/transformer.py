"""The decoder: Llama's layout (Qwen3's with QK-norm), with query-key-value and gate-up merged into one matrix each.

Letters: B rows, T tokens a row, D model width, H query heads, K key/value heads, h head width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from minifoundation.config import ModelConfig
from minifoundation.model.attention import KERNEL_OPERATORS, Backend, Mask, attend, documents_for, resolve, rows_for
from minifoundation.model.initial import draw_normals
from minifoundation.model.kernels import swiglu
from minifoundation.model.matrix import Matrix, refresh
from minifoundation.model.rope import apply_rope, positions_within, rope_frequencies, rotary_tables


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv:1910.07467): statistics in float32, scaled after the cast back, as Hugging Face does."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * normed.to(x.dtype)


class Block(nn.Module):
    """Attention and SwiGLU, each normed before and added to the residual stream after.

    Args:
        dtype: of activations.
        checkpointing: what this block does of ``config.checkpointing``.
    """

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, checkpointing: str) -> None:
        super().__init__()
        D, h = config.d_model, config.head_dim
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, h
        self.dropout = config.dropout
        self.checkpointing = checkpointing
        self.attention_norm = RMSNorm(D, config.norm_eps)
        self.qkv = Matrix(D, (config.n_head + 2 * config.n_kv_head) * h, dtype)
        self.q_norm = RMSNorm(h, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(h, config.norm_eps) if config.qk_norm else None
        self.out = Matrix(D, D, dtype)
        self.mlp_norm = RMSNorm(D, config.norm_eps)
        self.gate_up = Matrix(D, 2 * config.d_ff, dtype)
        self.down = Matrix(config.d_ff, D, dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, kernel: Backend, documents: Mask | None) -> Tensor:  # (B, T, D)
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self.branches(x, cos, sin, kernel, documents)
        # Inside forward, so that a compiled block sees it; a selective policy around compiled code would see no operators.
        extra: dict[str, Any] = {} if self.checkpointing == "full" else {"context_fn": KEEPING[self.checkpointing]}
        result: Tensor = checkpoint(
            self.branches,
            x,
            cos,
            sin,
            kernel,
            documents,
            use_reentrant=False,
            preserve_rng_state=self.training and self.dropout > 0,
            **extra,
        )
        return result

    def branches(self, x: Tensor, cos: Tensor, sin: Tensor, kernel: Backend, documents: Mask | None) -> Tensor:
        x = x + F.dropout(self.attention(self.attention_norm(x), cos, sin, kernel, documents), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.mlp_norm(x)), self.dropout, self.training)

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor, kernel: Backend, documents: Mask | None) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H + 2K, h)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        # Attention keeps what it reads for its backward: a slice would keep all of ``heads`` with it.
        mixed = attend(q, k, v.contiguous(), kernel, documents)  # (B, T, H, h)
        result: Tensor = self.out(mixed.flatten(-2))
        return result

    def mlp(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up(x)  # (B, T, 2F)
        if self.down.copy is not None:
            return swiglu.gated_product(gate_up, self.down.weight, self.down.copy)
        gate, up = gate_up.chunk(2, dim=-1)
        result: Tensor = self.down(F.silu(gate) * up)
        return result


def _keep_attention() -> Any:
    return create_selective_checkpoint_contexts(_attention_policy)


def _keep_products() -> Any:
    return create_selective_checkpoint_contexts(_products_policy)


KEEPING = {"attention": _keep_attention, "matmul": _keep_products}
"""What ``config.checkpointing`` keeps of a block, as the context that ``checkpoint`` takes."""

PRODUCT_OPERATORS = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default})


def _attention_policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KERNEL_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE


def _products_policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    kept = operator in PRODUCT_OPERATORS or operator in KERNEL_OPERATORS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class Transformer(nn.Module):
    """The decoder; its float32 weights are unset until ``initialise`` or ``load_state_dict``.

    Args:
        dtype: of activations.
    """

    frequencies: Tensor

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        # Looking up rows needs no copy of the matrix; only as a head does it multiply.
        self.embedding = Matrix(config.d_model, config.vocab_size, dtype if config.tie_embeddings else torch.float32)
        self.blocks = nn.ModuleList(
            Block(config, dtype=dtype, checkpointing="none" if i % config.checkpoint_every else config.checkpointing)
            for i in range(config.n_layer)
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tie_embeddings else Matrix(config.d_model, config.vocab_size, dtype)
        frequencies, self.gain = rope_frequencies(config.rope, config.head_dim, config.original_seq_len)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.matrices = [module for module in self.modules() if isinstance(module, Matrix)]

    @property
    def output(self) -> Matrix:
        """The (V, D) matrix of the output head: the embedding when tied."""
        return self.embedding if self.head is None else self.head

    @property
    def head_weight(self) -> Tensor:
        """The float32 weight of ``output``."""
        return self.output.weight

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return the hidden states (B, T, D) after the final norm of token ids (B, T).

        Args:
            cu_seqlens: where each document begins in the flattened tokens, each row beginning one, and B * T at the end, (documents + 1,)
                int32: attention stays within documents and positions restart in each, as if each were a row of its own. None: a row is one.
        """
        refresh(self.matrices)
        x = F.embedding(tokens, self.embedding.weight).to(self.dtype)
        cos, sin = rotary_tables(self.frequencies, self.gain, tokens.shape[1])
        kernel = self.kernel(tokens.device, masked=cu_seqlens is not None)
        documents = rows_for(kernel, tokens)
        if cu_seqlens is not None:
            positions = positions_within(cu_seqlens, *tokens.shape)
            cos, sin = cos[positions], sin[positions]  # (B, T, h/2)
            documents = documents_for(kernel, cu_seqlens, positions, self.dtype)
        for block in self.blocks:
            x = block(x, cos, sin, kernel, documents)
        result: Tensor = self.norm(x)
        return result

    def logits(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return the logits (B, T, V), float32 (float64 when the model computes in it)."""
        logits: Tensor = self.output(self(tokens, cu_seqlens))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def kernel(self, device: torch.device, *, masked: bool = False) -> Backend:
        """Return the attention kernel that runs on ``device``, within rows or (``masked``) within documents."""
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        head_dim = self.config.head_dim
        return resolve(self.config.attention, device.type, dtype=self.dtype, head_dim=head_dim, capability=capability, masked=masked)[0]

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Set every weight, the same for a seed on any device.

        Normal with ``config.weight_std``; the matrices that write to the residual stream smaller by sqrt(2 n_layer) (GPT-2), so that its
        variance does not grow with depth; norms are one.
        """
        matrices = []
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
                continue
            residual = name.endswith((".out.weight", ".down.weight"))
            matrices.append((weight, self.config.weight_std / (2 * self.config.n_layer) ** 0.5 if residual else self.config.weight_std))
        draw_normals(matrices, seed)
        self.frequencies.copy_(rope_frequencies(self.config.rope, self.config.head_dim, self.config.original_seq_len)[0])

    def compile_blocks(self) -> None:
        """Compile each block and the final norm in place; blocks share one graph, and the names in the state dict stay as they are."""
        for module in (*self.blocks, self.norm):
            # Static shapes: with automatic dynamic ones, which of two graphs runs would depend on the history of the process.
            module.compile(dynamic=False)
