from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from minifoundation.config import RopeConfig
from minifoundation.model.rope import apply_rope, raised_theta, rope_frequencies, rotary_tables, yarn_gain


def theirs(rope: RopeConfig, head_dim: int, original: int) -> tuple[torch.Tensor, float]:
    parameters: dict[str, object] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.scaling == "linear":
        parameters |= {"rope_type": "linear", "factor": rope.factor}
    if rope.scaling == "yarn":
        parameters |= {"rope_type": "yarn", "factor": rope.factor, "original_max_position_embeddings": original}
        parameters |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
    if rope.scaling == "llama3":
        parameters |= {"rope_type": "llama3", "factor": rope.factor, "original_max_position_embeddings": original}
        parameters |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    config = LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, max_position_embeddings=round(original * rope.factor), rope_parameters=parameters
    )
    kind = str(parameters["rope_type"])
    frequencies = LlamaRotaryEmbedding.compute_default_rope_parameters if kind == "default" else ROPE_INIT_FUNCTIONS[kind]
    found: tuple[torch.Tensor, float] = frequencies(config)
    return found


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(),
        RopeConfig(theta=500_000.0),
        RopeConfig(scaling="linear", factor=4),
        RopeConfig(scaling="yarn", factor=4),
        RopeConfig(scaling="yarn", factor=16, theta=500_000.0),
        RopeConfig(scaling="yarn", factor=2.5, beta_fast=20, beta_slow=2),
        RopeConfig(scaling="yarn", factor=1),
        RopeConfig(scaling="yarn", factor=4, theta=2.0),
        RopeConfig(scaling="llama3", factor=8, theta=500_000.0),
        RopeConfig(scaling="llama3", factor=32, theta=500_000.0),
        RopeConfig(scaling="llama3", factor=3, low_freq_factor=0.5, high_freq_factor=9),
    ],
    ids=str,
)
@pytest.mark.parametrize(("head_dim", "original"), [(64, 4096), (64, 8192), (128, 8192), (128, 2048), (16, 64), (8, 8)])
def test_frequencies_are_those_of_transformers(rope: RopeConfig, head_dim: int, original: int) -> None:
    frequencies, gain = rope_frequencies(rope, head_dim, original)
    expected, expected_gain = theirs(rope, head_dim, original)
    assert torch.equal(frequencies, expected)
    assert gain == expected_gain


def test_ntk_keeps_the_highest_frequency_and_divides_the_lowest_by_the_factor() -> None:
    plain, _ = rope_frequencies(RopeConfig(), 64, 4096)
    scaled, gain = rope_frequencies(RopeConfig(scaling="ntk", factor=4), 64, 4096)
    assert gain == 1.0
    assert scaled[0] == plain[0]
    assert scaled[-1].item() == pytest.approx(plain[-1].item() / 4, rel=1e-5)
    base = raised_theta(RopeConfig(scaling="ntk", factor=4), 64, 4096)
    assert torch.equal(scaled, rope_frequencies(RopeConfig(theta=base), 64, 4096)[0])


@pytest.mark.parametrize(("original", "factor"), [(4096, 4), (2048, 4), (4096, 16), (256, 8)])
def test_theta_moves_the_critical_dimension_to_the_new_length(original: int, factor: float) -> None:
    """As many channels turn at least once over the new length as did over the old one: what arXiv:2310.05209 asks of a base."""
    width = 1 << 14  # fine enough to count by
    plain, _ = rope_frequencies(RopeConfig(), width, original)
    rope = RopeConfig(scaling="theta", factor=factor)
    scaled, gain = rope_frequencies(rope, width, original)
    turned = int((plain * original >= 2 * math.pi).sum())
    assert gain == 1.0 and abs(int((scaled * original * factor >= 2 * math.pi).sum()) - turned) <= 1
    assert raised_theta(rope, 64, original) > raised_theta(RopeConfig(scaling="ntk", factor=factor), 64, original)


def test_the_base_for_64k_is_near_llama_3s() -> None:
    """Code Llama took 1e6 for 4k to 16k, and Llama 3 500,000 for its 8k and then 128k."""
    assert raised_theta(RopeConfig(scaling="theta", factor=16), 64, 4096) == pytest.approx(514_000, rel=0.01)


def test_yarn_leaves_fast_frequencies_and_interpolates_slow_ones() -> None:
    plain, _ = rope_frequencies(RopeConfig(), 64, 4096)
    scaled, gain = rope_frequencies(RopeConfig(scaling="yarn", factor=8), 64, 4096)
    rotations = 4096 * plain / (2 * math.pi)
    assert torch.equal(scaled[rotations > 64], plain[rotations > 64])
    torch.testing.assert_close(scaled[rotations < 0.5], plain[rotations < 0.5] / 8)
    assert gain == pytest.approx(0.1 * math.log(8) + 1)
    assert yarn_gain(1.0) == 1.0


@pytest.mark.parametrize("rope", [RopeConfig(), RopeConfig(scaling="yarn", factor=4)], ids=str)
def test_rotation_is_that_of_transformers(rope: RopeConfig) -> None:
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4}
        if rope.scaling == "none"
        else {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
    )
    x = torch.randn(2, 200, 4, 16)
    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(200)[None])
    expected, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    frequencies, gain = rope_frequencies(rope, 16, 64)
    assert torch.equal(apply_rope(x, *rotary_tables(frequencies, gain, 200)), expected.transpose(1, 2))


def test_scores_depend_on_relative_positions_alone() -> None:
    frequencies, gain = rope_frequencies(RopeConfig(), 32, 4096)
    cos, sin = rotary_tables(frequencies, gain, 64)
    q, k = (torch.randn(32, dtype=torch.float64).expand(1, 64, 1, 32) for _ in "qk")
    scores = apply_rope(q, cos, sin)[0, :, 0] @ apply_rope(k, cos, sin)[0, :, 0].T
    for distance in (0, 1, 17):
        line = scores.diagonal(-distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-4, atol=1e-4)


def test_low_precision_is_rotated_in_float32() -> None:
    frequencies, gain = rope_frequencies(RopeConfig(), 64, 4096)
    cos, sin = rotary_tables(frequencies, gain, 4096)
    x = torch.randn(1, 4096, 1, 64, dtype=torch.bfloat16)
    rotated = apply_rope(x, cos, sin)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, apply_rope(x.float(), cos, sin).bfloat16())
