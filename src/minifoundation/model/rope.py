"""Rotary position embedding and its scalings, in the arithmetic and layout of transformers' ``modeling_rope_utils``.

Letters: B rows, T tokens a row, H heads, h head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minifoundation.config import RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int, original_seq_len: int) -> tuple[Tensor, float]:
    """Return the frequencies in radians a token, (h/2,) float32 on the CPU, and the gain on cos and sin.

    none: RoFormer (arXiv:2104.09864). linear: position interpolation (arXiv:2306.15595). ntk, theta: a raised base, see
    ``raised_theta``. yarn: arXiv:2309.00071, NTK-by-parts (section 3.2) with the attention temperature (section 3.4) as a gain. llama3: by
    parts too, a ramp over rotations instead of indices (``apply_scaling`` of meta-llama/llama-models).
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    match rope.scaling:
        case "none":
            return 1.0 / rope.theta**exponent, 1.0
        case "linear":
            return 1.0 / rope.theta**exponent / rope.factor, 1.0
        case "ntk" | "theta":
            return 1.0 / raised_theta(rope, head_dim, original_seq_len) ** exponent, 1.0
        case "yarn":
            period = rope.theta**exponent
            low = max(math.floor(_dimension_of(rope.beta_fast, rope, head_dim, original_seq_len)), 0)
            high = min(math.ceil(_dimension_of(rope.beta_slow, rope, head_dim, original_seq_len)), head_dim - 1)
            width = high - low if high != low else 0.001
            interpolated = ((torch.arange(head_dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)
            extrapolated = 1 - interpolated
            frequencies = 1.0 / (rope.factor * period) * (1 - extrapolated) + 1.0 / period * extrapolated
            return frequencies, yarn_gain(rope.factor)
        case "llama3":
            plain = 1.0 / rope.theta**exponent
            rotations = original_seq_len / (2 * math.pi / plain)
            kept = ((rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
            return (1 - kept) * plain / rope.factor + kept * plain, 1.0


def raised_theta(rope: RopeConfig, head_dim: int, original_seq_len: int) -> float:
    """Return the base that stands in for scaling by ``factor``.

    ntk: static, the lowest frequency is divided by ``factor``, the highest kept (bloc97, 2023). theta: the frequency that turned once over
    the original length, the critical dimension, turns once over the extended one, so that all above it have been seen in full:
    theta^(ln(s C / 2 pi) / ln(C / 2 pi)) (arXiv:2310.05209, theorem 1, solved for the base).
    """
    if rope.scaling == "ntk":
        return float(rope.theta * rope.factor ** (head_dim / max(head_dim - 2, 1)))
    turn = math.log(original_seq_len / (2 * math.pi))
    return float(rope.theta ** ((turn + math.log(rope.factor)) / turn))


def yarn_gain(factor: float) -> float:
    """Return YaRN's gain on cos and sin, the square root of 1/t in arXiv:2309.00071, equation 22."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _dimension_of(rotations: float, rope: RopeConfig, head_dim: int, original_seq_len: int) -> float:
    """Return the (fractional) index of the frequency that turns ``rotations`` times over the original length."""
    return head_dim * math.log(original_seq_len / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))


def rotary_tables(frequencies: Tensor, gain: float, seq_len: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin, (T, h/2) float32, of positions 0 .. T-1."""
    angles = torch.arange(seq_len, dtype=torch.float32, device=frequencies.device)[:, None] * frequencies
    return angles.cos() * gain, angles.sin() * gain


def positions_within(cu_seqlens: Tensor, n_rows: int, seq_len: int) -> Tensor:
    """Return the distance (B, T) int64 of each token from the beginning of its document.

    Args:
        cu_seqlens: where each document begins in the flattened tokens, and B * T at the end; each row begins one.
    """
    starts = cu_seqlens[:-1].long().repeat_interleave(cu_seqlens.diff(), output_size=n_rows * seq_len)
    return (torch.arange(n_rows * seq_len, device=cu_seqlens.device) - starts).view(n_rows, seq_len)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x`` (B, T, H, h) rotated, pairing channel i with i + h/2 as Hugging Face does (GPT-J pairs 2i with 2i + 1).

    The tables are (T, h/2), or (B, T, h/2) where the positions of the rows differ.
    The rotation is done in float32 even when ``x`` is not: bfloat16 angles blur relative positions in long contexts (arXiv:2411.13476).
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (..., T, 1, h/2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
