"""What a model of some settings takes: parameters, arithmetic, memory. Pure arithmetic on the settings; imports no torch.

Letters: D model width, H query heads, K key/value heads, h head width, F feed-forward width, V vocabulary, L blocks, N tokens at once.
"""

from __future__ import annotations

import math

from minifoundation.config import ModelConfig

MOMENT_BYTES = {"fp32": 8.0, "int8": 2 * (1 + 4 / 256)}
"""Bytes of AdamW's two moments a parameter; int8 has a float32 scale for each 256 [torchao]."""

GATES_AT_ONCE = 16_384
"""Tokens whose gates a checkpointed block by hand holds at once (``fused.AT_ONCE``)."""


def n_parameters(config: ModelConfig) -> int:
    """Return the number of weights, a tied head counted once."""
    D, h = config.d_model, config.head_width
    norms = 2 * D + (2 * h if config.qk_norm else 0)
    heads = 1 if config.tie_embeddings else 2
    return heads * config.vocab_size * D + config.n_layer * (_block_matrices(config) + norms) + D


def n_matmul_parameters(config: ModelConfig) -> int:
    """Return the number of weights that multiply activations: the blocks' matrices and the head, not norms, not the embedding look-up."""
    return config.n_layer * _block_matrices(config) + config.vocab_size * config.d_model


def rows_divisor(config: ModelConfig) -> int:
    """Return the largest number of parts of equal size into which the rows of every weight can be divided."""
    D, H, K, h = config.d_model, config.n_head, config.n_kv_head, config.head_width
    return math.gcd(D, (H + 2 * K) * h, 2 * config.d_ff, config.vocab_size, h if config.qk_norm else 0)


def _block_matrices(config: ModelConfig) -> int:
    D, h = config.d_model, config.head_width
    return D * (2 * config.n_head + 2 * config.n_kv_head) * h + 3 * D * config.d_ff


def flops_per_token(config: ModelConfig, attended_length: float) -> float:
    """Return the FLOPs of forward and backward a token: 6 N + 6 L H h T.

    A multiply-add is 2 FLOPs, the backward twice the forward (Kaplan et al., arXiv:2001.08361). Attention is counted causally: a
    token reads T/2 others on average in two products, 2 x 2 x H h x T/2 forward. Recomputation is not counted: this is model FLOPs,
    what MFU is defined on (PaLM, arXiv:2204.02311, appendix B, with its full attention halved).

    Args:
        attended_length: T, the length of the rows; where attention stays within documents, the mean over the tokens of the length of their
            document (``Batch.attended_length``).
    """
    return 6.0 * n_matmul_parameters(config) + 6.0 * config.n_layer * config.n_head * config.head_width * attended_length


def memory_bytes(
    config: ModelConfig,
    *,
    batch_size: int,
    seq_len: int,
    grad_accum: int,
    precision: str,
    optimizer_states: str,
    ema: bool,
    loss_chunk: int,
    context: int = 1,
    shards: int = 1,
    optimizer_shards: int = 1,
    regathers: bool = True,
    sent: int = 0,
) -> dict[str, int]:
    """Return the predicted peak of allocated device memory by what it holds, in bytes; the sum is the prediction.

    The largest of four moments of the last micro-batch: its loss and the backward of its last block, when all saved activations exist
    (and gradients, if a micro-batch went before); the backward of its first block, when all gradients exist; and when they are sent.
    Blocks are taken as by hand in half precision and as compiled in fp32, the loss as Triton's. Against measurements: docs/numerics.md.

    Args:
        grad_accum: micro-batches in a step.
        precision: fp32, bf16, fp16 or fp8.
        optimizer_states: fp32 or int8.
        ema: whether an averaged copy of the weights is kept on the device.
        loss_chunk: tokens whose logits are held at once.
        context: devices that read a row together: each has as small a part of the tokens.
        shards: parts that weights and gradients are in, on as many devices.
        optimizer_shards: parts that moments and averages are in.
        regathers: gathered weights of a block are given up after its forward.
        sent: bytes a parameter of the copies in which gradients travel, where they travel all at once.
    """
    parameters, N, V, D = n_parameters(config), batch_size * seq_len // context, config.vocab_size, config.d_model
    item = 4 if precision == "fp32" else 2
    kind = config.checkpointing if item == 2 or config.checkpointing != "offload" else "attention"
    checkpointed = 0 if kind == "none" else -(-config.n_layer // config.checkpoint_every)
    fp8 = precision == "fp8"
    of_block = N * (_saved_by_block(config, item) + (config.n_head * config.head_width if fp8 else 0))  # what attention mixed, once more
    kept, attention, gates = _checkpointed(config, kind, N, item)
    if context > 1:  # keys and values of whole rows; by hand they are gathered again for the backward
        gathered = batch_size * seq_len * 2 * config.n_kv_head * config.head_width
        of_block += 0 if item == 2 else item * gathered
        # They, their gradients as the kernel gives them and those of the other chunk, and the kernel's sums in float32.
        attention += gathered * (3 * item + 4)
        parts = N * item * config.n_head * config.head_width  # what was mixed by chunks, beside the whole that is put together from it
        of_block += parts
        kept += parts if kind == "attention" else 0
    again = max(gates, attention)
    activations = (config.n_layer - checkpointed) * of_block + checkpointed * kept
    # The widest gradients of a block: of gate, up and their product; in half precision the product again.
    workspace = N * item * (4 if item == 2 else 3) * config.d_ff
    if context > 1:
        workspace = max(workspace, attention)
    if kind in ("attention", "offload") and item == 2:
        at_work = again if checkpointed == config.n_layer else max(again, workspace)
        made = 0
    else:
        at_work, made = workspace, of_block if checkpointed else 0
    head_gradient = 4 * V * D
    copies = 2 * n_matmul_parameters(config) + (2 * V * D if fp8 else 0) if item == 2 else 0
    gradients = 4 * parameters
    if shards > 1:  # gathered, in the dtype of compute: what is outside the blocks, and the block at work and the next one, or all
        block = _block_matrices(config)
        copies = item * ((1 if config.tie_embeddings else 2) * V * D + (2 if regathers else config.n_layer) * block)
        # What is gathered has a gradient in the same dtype, and both are sent from and to buffers of two blocks.
        gradients = 4 * parameters if grad_accum > 1 else 4 * parameters // shards
        copies += 2 * (item + 4) * block
    always = {
        "weights": 4 * parameters // shards,
        "weight_copies": copies,
        "optimizer": round(MOMENT_BYTES[optimizer_states] * parameters / optimizer_shards),
        "ema": 4 * parameters // optimizer_shards if ema else 0,
    }
    earlier_gradients = gradients * (grad_accum > 1)
    at_loss = {
        **always,
        "gradients": earlier_gradients,
        "activations": activations + N * D * item,
        # The head's gradient, that of the hidden states, and a chunk of logits, which their gradient overwrites.
        "loss": head_gradient + N * D * item + min(loss_chunk, N) * V * item + (N * D + min(loss_chunk, N) * V if fp8 else 0),
    }
    at_last_block = {
        **always,
        "gradients": earlier_gradients,
        "activations": activations + made,
        "loss": head_gradient + N * D * item,
        "block_workspace": at_work,
    }
    first = kept if kind in ("attention", "offload") and item == 2 else of_block
    at_first_block = {**always, "gradients": max(gradients, earlier_gradients), "activations": first, "block_workspace": at_work}
    at_sending = {**always, "gradients": max(gradients, earlier_gradients) + sent * parameters}
    return max(at_loss, at_last_block, at_first_block, at_sending, key=lambda parts: sum(parts.values()))


def _checkpointed(config: ModelConfig, kind: str, tokens: int, item: int) -> tuple[int, int, int]:
    """Return the bytes that a checkpointed block keeps, and those that its backward takes beside them where the block is by hand.

    The latter for attention, and for the gates after it.
    """
    D, h, H, K, F = config.d_model, config.head_width, config.n_head, config.n_kv_head, config.d_ff
    large = item * (D + H * h)  # its input, and what attention mixed
    small = 4 * (H + 1)  # logsumexp of attention, a norm
    kept = {"none": 0, "attention": large + small, "offload": small, "full": item * D}[kind]
    # The gates of some tokens: gate and up, their gradients, the product and its own; hidden states beside them. Of all tokens the
    # gradients of what comes out of the block, goes in, and was mixed.
    gates = min(tokens, GATES_AT_ONCE) * item * (6 * F + 5 * D) + tokens * item * (2 * D + H * h)
    # Heads again and their gradients, those of mixed and of the residual; sums of the gradients of heads in float32, as FlashAttention has.
    attention = tokens * (item * (2 * (H + 2 * K) * h + H * h + D) + 4 * (H + 2 * K) * h)
    moving = 2 * tokens * large if kind == "offload" else 0  # of the block at work and the one before
    return tokens * kept, attention + moving, gates + moving


def _saved_by_block(config: ModelConfig, item: int) -> int:
    """Return the bytes a token that a block saves for its backward."""
    D, h, H, K = config.d_model, config.head_width, config.n_head, config.n_kv_head
    # Two inputs of norms; q, k and v as attention reads them and its output; gate and up. Normed values and the product of gate and up are
    # made again in half precision. With QK-norm, heads before it too.
    made_again = 0 if item == 2 else 2 * D + config.d_ff
    before_norm = (H + K) * h if config.qk_norm else 0
    return item * (2 * D + (H + 2 * K) * h + H * h + 2 * config.d_ff + made_again + before_norm) + 4 * (
        H + 2
    )  # logsumexp of attention, two norms
