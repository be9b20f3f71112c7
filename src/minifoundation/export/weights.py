"""The pure pair between our weights and Hugging Face's, and the config that goes with them.

Letters: D model width, H query heads, K key/value heads, h head width, F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minifoundation.config import ModelConfig
from minifoundation.data.tokenizer import SPECIAL, Special
from minifoundation.model.rope import raised_theta

NORMS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}
MATRICES = {"out": "self_attn.o_proj", "down": "mlp.down_proj"}


def to_hf(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our weights under the names and in the split of ``LlamaForCausalLM`` (``Qwen3ForCausalLM``); a tied head is not repeated.

    The tensors share memory with ``state``.
    """
    heads = [config.n_head * config.head_width, config.n_kv_head * config.head_width, config.n_kv_head * config.head_width]
    hf = {"model.embed_tokens.weight": state["embedding.weight"], "model.norm.weight": state["norm.weight"]}
    for i in range(config.n_layer):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        for name, hf_name in _same(config):
            hf[f"{theirs}.{hf_name}.weight"] = state[f"{ours}.{name}.weight"]
        for letter, part in zip("qkv", state[f"{ours}.qkv.weight"].split(heads), strict=True):
            hf[f"{theirs}.self_attn.{letter}_proj.weight"] = part
        for gate_or_up, part in zip(("gate", "up"), state[f"{ours}.gate_up.weight"].split(config.d_ff), strict=True):
            hf[f"{theirs}.mlp.{gate_or_up}_proj.weight"] = part
    if not config.tie_embeddings:
        hf["lm_head.weight"] = state["head.weight"]
    return hf


def from_hf(config: ModelConfig, hf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return Hugging Face's weights under our names, merged: the inverse of ``to_hf``."""
    state = {"embedding.weight": hf["model.embed_tokens.weight"], "norm.weight": hf["model.norm.weight"]}
    for i in range(config.n_layer):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        for name, hf_name in _same(config):
            state[f"{ours}.{name}.weight"] = hf[f"{theirs}.{hf_name}.weight"]
        state[f"{ours}.qkv.weight"] = torch.cat([hf[f"{theirs}.self_attn.{letter}_proj.weight"] for letter in "qkv"])
        state[f"{ours}.gate_up.weight"] = torch.cat([hf[f"{theirs}.mlp.{part}_proj.weight"] for part in ("gate", "up")])
    if not config.tie_embeddings:
        state["head.weight"] = hf["lm_head.weight"]
    return state


def _same(config: ModelConfig) -> list[tuple[str, str]]:
    """Return (our name, theirs) of the weights of a block that are only renamed."""
    return [(ours, theirs) for ours, theirs in (NORMS | MATRICES).items() if config.qk_norm or ours not in ("q_norm", "k_norm")]


def hf_config(config: ModelConfig, special: Special = SPECIAL) -> dict[str, Any]:
    """Return the content of ``config.json``: Llama, or Qwen3 with QK-norm; neither needs remote code.

    transformers 5 reads ``rope_parameters`` and lets ``rope_scaling`` win over it, 4.x reads ``rope_theta`` and ``rope_scaling``: all three
    are written and agree.
    """
    rope = _rope_parameters(config)
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "LlamaForCausalLM"],
        "model_type": "qwen3" if config.qk_norm else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.weight_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        **token_ids(special),
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling if scaling["rope_type"] != "default" else None,
    } | ({} if config.qk_norm else {"mlp_bias": False})


def _rope_parameters(config: ModelConfig) -> dict[str, Any]:
    rope = config.rope
    match rope.scaling:
        case "none":
            return {"rope_type": "default", "rope_theta": rope.theta}
        case "linear":
            return {"rope_type": "linear", "rope_theta": rope.theta, "factor": rope.factor}
        case "ntk" | "theta":  # transformers has only the dynamic variant of ntk, whose base depends on the length; a fixed one is a theta
            return {"rope_type": "default", "rope_theta": raised_theta(rope, config.head_width, config.original_seq_len)}
        case "yarn":
            return {
                "rope_type": "yarn",
                "rope_theta": rope.theta,
                "factor": rope.factor,
                "original_max_position_embeddings": config.original_seq_len,
                "beta_fast": rope.beta_fast,
                "beta_slow": rope.beta_slow,
            }
        case "llama3":
            return {
                "rope_type": "llama3",
                "rope_theta": rope.theta,
                "factor": rope.factor,
                "original_max_position_embeddings": config.original_seq_len,
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
            }


def token_ids(special: Special) -> dict[str, int | None]:
    """Return the special ids as ``config.json`` and ``generation_config.json`` name them."""
    return {"pad_token_id": special.pad, "bos_token_id": special.bos, "eos_token_id": special.eos}


def write_model(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    folder: Path,
    dtype: torch.dtype,
    special: Special = SPECIAL,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write the weights in ``dtype``, ``config.json`` and ``generation_config.json`` into an existing folder.

    The weights are ``model.safetensors``, or several files and ``model.safetensors.index.json`` where they have more than
    ``max_shard_bytes``. Rows of the vocabulary beyond the tokenizer's pieces are padding; they are written like the others.

    Raises:
        OSError: the disk is full.
    """
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    weights = {name: value.detach().to("cpu", dtype, copy=True).contiguous() for name, value in to_hf(config, state).items()}
    try:
        save_torch_state_dict(weights, folder, max_shard_size=max_shard_bytes)
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" in str(error):  # the library has no other way of saying it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from None
        raise
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # the library makes them for the user alone
    name = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", hf_config(config, special) | {"dtype": name, "torch_dtype": name})
    _write_json(folder / "generation_config.json", token_ids(special))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
