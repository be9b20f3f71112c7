"""The decoder: Llama's layout (Qwen3's with QK-norm), with query-key-value and gate-up merged into one matrix each.

Letters: B rows, T tokens a row, D model width, H query heads, K key/value heads, h head width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from minifoundation.config import ModelConfig
from minifoundation.model.attention import (
    KERNEL_OPERATORS,
    Backend,
    Chunks,
    Context,
    Mask,
    attend,
    documents_for,
    keys_and_values,
    resolve,
    rows_for,
)
from minifoundation.model.fp8 import Scales, Sites
from minifoundation.model.fused import AfterAttention, AttentionInputs, HeadNorms, Norm, heads_again
from minifoundation.model.initial import draw_normals
from minifoundation.model.kept import Copies, Kept, MadeAgain, Offloaded, PageLocked
from minifoundation.model.kernels.language import runs_on
from minifoundation.model.kernels.quantise import Rounded, Site
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

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        checkpointing: str,
        fp8: bool = False,
        in_epilogue: bool = False,
        copies: bool = True,
    ) -> None:
        super().__init__()
        D, h = config.d_model, config.head_width
        half = copies and not fp8
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, h
        self.dropout = config.dropout
        self.checkpointing = checkpointing
        self.attention_norm = RMSNorm(D, config.norm_eps)
        self.qkv = Matrix(D, (config.n_head + 2 * config.n_kv_head) * h, dtype, small=fp8, half=half)
        self.q_norm = RMSNorm(h, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(h, config.norm_eps) if config.qk_norm else None
        self.out = Matrix(config.n_head * h, D, dtype, small=fp8, half=half)
        self.mlp_norm = RMSNorm(D, config.norm_eps)
        self.gate_up = Matrix(D, 2 * config.d_ff, dtype, small=fp8, half=half, interleaved=in_epilogue)
        self.in_epilogue = in_epilogue
        self.down = Matrix(config.d_ff, D, dtype, small=fp8, half=half)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        kernel: Backend,
        documents: Mask | Chunks | None,
        sites: Sites | None = None,
        kept: Kept | None = None,
    ) -> Tensor:  # (B, T, D)
        """Return the block's output (B, T, D); by hand (``fused``) with ``sites``, which say what of it is in 8 bits, and ``kept``."""
        whole = self.branches if sites is None else partial(self.fused, sites=sites, kept=kept or Kept())
        selective = self.checkpointing in ("attention", "offload")
        if self.checkpointing == "none" or not torch.is_grad_enabled() or (selective and sites is not None):
            return whole(x, cos, sin, kernel, documents)
        # Inside forward, so that a compiled block sees it; a selective policy around compiled code would see no operators.
        extra: dict[str, Any] = {"context_fn": _keep_attention} if selective else {}
        result: Tensor = checkpoint(
            whole,
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

    def branches(self, x: Tensor, cos: Tensor, sin: Tensor, kernel: Backend, documents: Mask | Chunks | None) -> Tensor:
        x = x + F.dropout(self.attention(self.attention_norm(x), cos, sin, kernel, documents), self.dropout, self.training)
        return x + F.dropout(self.mlp(self.mlp_norm(x)), self.dropout, self.training)

    def fused(
        self, x: Tensor, cos: Tensor, sin: Tensor, kernel: Backend, documents: Mask | Chunks | None, *, sites: Sites, kept: Kept
    ) -> Tensor:
        """Return what ``branches`` does, by the functions of ``model/fused.py``.

        Selective checkpointing is done in here, not by torch's, which would make the product after the gates again although no backward
        reads it.
        """
        if self.checkpointing == "offload":
            kept.park(x)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack) if self.checkpointing == "offload" else nullcontext():
            return self._fused(x, cos, sin, kernel, documents, sites, kept).view_as(x)

    def _fused(
        self, x: Tensor, cos: Tensor, sin: Tensor, kernel: Backend, documents: Mask | Chunks | None, sites: Sites, kept: Kept
    ) -> Tensor:
        B, T, _ = x.shape
        flat = x.flatten(0, 1)
        again = self.checkpointing in ("attention", "offload")
        turned_inside = self.q_norm is None
        tables = (cos.flatten(0, -2), sin.flatten(0, -2)) if turned_inside else None
        shape = B, T, self.n_head, self.n_kv_head, self.head_dim
        gain, eps = self.attention_norm.weight, self.attention_norm.eps
        rest = self.qkv.operand, eps, tables, shape, sites

        def normed(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            assert self.q_norm is not None and self.k_norm is not None
            return apply_rope(self.q_norm(q), cos, sin), apply_rope(self.k_norm(k), cos, sin)

        packed = kept.pack(flat)

        @torch.no_grad()
        def make() -> Sequence[Tensor]:
            q, k, v = heads_again(kept.unpack(packed), gain, *rest)
            heads = [q, k, v]
            if not turned_inside:
                q, k = normed(q, k)
                heads += [q, k]
            return (*heads, *keys_and_values(k, v, documents))

        q, k, v, flat = AttentionInputs.apply(flat, gain, self.qkv.weight, *rest)  # type: ignore[no-untyped-call]
        made = MadeAgain(make, kept)
        heads = [q, k, v]
        if self.q_norm is not None and self.k_norm is not None:
            with made.instead_of(*heads) if again else nullcontext():
                q, k = HeadNorms.apply(q, k, normed, self.q_norm.weight, self.k_norm.weight)  # type: ignore[no-untyped-call]
            heads += [q, k]
        keys, values = keys_and_values(k, v, documents)
        instead: AbstractContextManager[None] = nullcontext()
        if again:
            instead = made.instead_of(*heads, keys, values)
        elif isinstance(documents, Chunks) and self.checkpointing == "none":
            # Those of whole rows are not kept, but gathered again: the more share a row, the more of what a block keeps they would be.
            instead = MadeAgain(partial(_gathered, k.detach(), v.detach(), documents), kept).instead_of(keys, values)
        with instead:
            mixed = attend(q, keys, values, kernel, documents).reshape(B * T, -1)
        weights = self.out.weight, self.mlp_norm.weight, self.gate_up.weight, self.down.weight
        operands = self.out.operand, self.gate_up.operand, self.down.operand
        result: Tensor = AfterAttention.apply(  # type: ignore[no-untyped-call]
            mixed, flat, *weights, operands, eps, sites, self.in_epilogue, again, self.in_epilogue and self.gate_up.copy is None
        )
        return result

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor, kernel: Backend, documents: Mask | Chunks | None) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H + 2K, h)
        q, k, v = heads.split([self.n_head, self.n_kv_head, self.n_kv_head], dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        # Attention keeps what it reads for its backward: a slice would keep all of ``heads`` with it.
        mixed = attend(q, *keys_and_values(k, v.contiguous(), documents), kernel, documents)  # (B, T, H, h)
        result: Tensor = self.out(mixed.flatten(-2))
        return result

    def mlp(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, T, F) each
        result: Tensor = self.down(F.silu(gate) * up)
        return result


@torch.no_grad()
def _gathered(k: Tensor, v: Tensor, documents: Chunks) -> Sequence[Tensor]:
    return keys_and_values(k, v, documents)


def _keep_attention() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KERNEL_OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE


class Transformer(nn.Module):
    """The decoder; its float32 weights are unset until ``initialise`` or ``load_state_dict``.

    Args:
        dtype: of activations.
        fp8: factors of the blocks' products are in 8 bits, and of two of the head's three.
        in_epilogue: SwiGLU is computed in the products beside it, by QuACK.
        rows: the kernel of attention for batches with documents whose rows are one document each; auto: as for the others.
        copies: half precision is had by copies of float32 weights; False where the weights themselves come in ``dtype``, from what gathers
            them before a block is called.
        context: who reads the rest of each row: tokens are then those of the chunks that are here. None: rows are whole.
    """

    frequencies: Tensor

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        fp8: bool = False,
        in_epilogue: bool = False,
        rows: Backend = "auto",
        copies: bool = True,
        context: Context | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.in_epilogue = in_epilogue
        self.rows = rows
        self.context = context
        self.scales = Scales(config.n_layer) if fp8 else None
        # Looking up rows needs no copy of the matrix; only as a head does it multiply.
        self.embedding = Matrix(
            config.d_model,
            config.vocab_size,
            dtype if config.tie_embeddings else torch.float32,
            half=copies,
            small=fp8 and config.tie_embeddings,
        )
        self.blocks = nn.ModuleList(
            Block(
                config,
                dtype=dtype,
                fp8=fp8,
                in_epilogue=in_epilogue,
                copies=copies,
                checkpointing="none" if i % config.checkpoint_every else config.checkpointing,
            )
            for i in range(config.n_layer)
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = None if config.tie_embeddings else Matrix(config.d_model, config.vocab_size, dtype, small=fp8, half=copies)
        frequencies, self.gain = rope_frequencies(config.rope, config.head_width, config.original_seq_len)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self._copies: Copies | None = None
        self.matrices = [module for module in self.modules() if isinstance(module, Matrix)]

    @property
    def output(self) -> Matrix:
        """The (V, D) matrix of the output head: the embedding when tied."""
        return self.embedding if self.head is None else self.head

    @property
    def head_weight(self) -> Tensor:
        """The float32 weight of ``output``."""
        return self.output.weight

    def head_in_8_bits(self) -> tuple[Site, Rounded] | None:
        """Return how hidden states are rounded for the head, and the head itself, in 8 bits; None without them."""
        if self.scales is None:
            return None
        return self.scales.head(watched=torch.is_grad_enabled()), self.output.small

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return the hidden states (B, T, D) after the final norm of token ids (B, T).

        Args:
            cu_seqlens: where each document begins in the flattened tokens of whole rows, each row beginning one, and B * T at the end,
                (documents + 1,) int32: attention stays within documents and positions restart in each, as if each were a row of its own.
                None: a row is one.
        """
        refresh(self.matrices)
        x = F.embedding(tokens, self.embedding.weight).to(self.dtype)
        seq_len = tokens.shape[1] * (1 if self.context is None else self.context.size)
        cos, sin = rotary_tables(self.frequencies, self.gain, seq_len)
        whole = cu_seqlens is not None and len(cu_seqlens) == len(tokens) + 1 and self.by_hand_on(x)  # a graph would be compiled twice
        if whole:
            cu_seqlens = None
        kernel = self.kernel(tokens.device, masked=cu_seqlens is not None, asked=self.rows if whole else "auto")
        documents: Mask | Chunks | None
        if cu_seqlens is None:
            cos, sin = self._here(cos), self._here(sin)
            documents = rows_for(kernel, tokens, self.context)
        else:
            positions = positions_within(cu_seqlens, len(tokens), seq_len)
            here = self._here(positions.T).T
            cos, sin = cos[here], sin[here]  # (B, T here, h/2)
            documents = documents_for(kernel, cu_seqlens, positions, self.dtype, self.context)
        if not self.by_hand_on(x):
            for block in self.blocks:
                x = block(x, cos, sin, kernel, documents)
            plain: Tensor = self.norm(x)
            return plain
        offloaded: Offloaded | None = None
        for number, block in enumerate(self.blocks):
            sites = Sites() if self.scales is None else self.scales.sites(number, watched=torch.is_grad_enabled())
            kept = Kept()
            if block.checkpointing == "offload" and torch.is_grad_enabled():
                kept = offloaded = Offloaded(offloaded, self.copies(x.device))
            x = block(x, cos, sin, kernel, documents, sites, kept)
        result: Tensor = Norm.apply(x.flatten(0, 1), self.norm.weight, self.norm.eps)  # type: ignore[no-untyped-call]
        return result.view_as(x)

    def _here(self, values: Tensor) -> Tensor:
        """Return, of what there is for each token of a row, (T, ...), that of the tokens that are here."""
        if self.context is None:
            return values
        return torch.cat([values[first:end] for first, end in self.context.chunks(len(values))])

    def logits(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return the logits (B, T, V), float32 (float64 when the model computes in it)."""
        logits: Tensor = self.output(self(tokens, cu_seqlens))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def copies(self, device: torch.device) -> Copies:
        """Return what moves the activations of offloaded blocks; made once, since it holds streams."""
        if self._copies is None:
            self._copies = PageLocked(device)
        return self._copies

    def by_hand_on(self, x: Tensor) -> bool:
        """Return whether the blocks for activations like ``x`` are those of ``model/fused.py``."""
        must = self.scales is not None or self.in_epilogue
        return must or (x.dtype.itemsize == 2 and runs_on(x) and self.config.dropout == 0)

    def kernel(self, device: torch.device, *, masked: bool = False, asked: Backend = "auto") -> Backend:
        """Return the attention kernel that runs on ``device``, within rows or (``masked``) within documents.

        Args:
            asked: instead of the model's.
        """
        capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
        head_dim = self.config.head_width
        asked = self.config.attention if asked == "auto" else asked
        return resolve(
            asked, device.type, dtype=self.dtype, head_dim=head_dim, capability=capability, masked=masked, chunked=self.context is not None
        )[0]

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
        self.frequencies.copy_(rope_frequencies(self.config.rope, self.config.head_width, self.config.original_seq_len)[0])

    def compile_blocks(self) -> None:
        """Compile each block and the final norm in place; blocks share one graph, and the names in the state dict stay as they are.

        Blocks by hand are left as they are: theirs are kernels already.
        """
        if self.by_hand_on(torch.empty(0, dtype=self.dtype, device=self.embedding.weight.device)):
            return
        for module in (*self.blocks, self.norm):
            # Static shapes: with automatic dynamic ones, which of two graphs runs would depend on the history of the process.
            module.compile(dynamic=False)
