from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from minifoundation.config import ModelConfig, RopeConfig
from minifoundation.export.weights import from_hf, hf_config, to_hf, write_model
from minifoundation.model.rope import raised_theta
from minifoundation.model.transformer import Transformer


def tiny(**changes: Any) -> ModelConfig:
    settings = {"vocab_size": 96, "d_model": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 48, "original_seq_len": 32}
    return ModelConfig.model_validate(settings | changes)


def model(config: ModelConfig) -> Transformer:
    transformer = Transformer(config)
    transformer.initialise(0)
    return transformer


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("head_dim", [None, 12])
def test_names_and_shapes_are_those_of_transformers_and_the_way_back_is_exact(qk_norm: bool, tie: bool, head_dim: int | None) -> None:
    config = tiny(qk_norm=qk_norm, tie_embeddings=tie, head_dim=head_dim)
    state = model(config).state_dict()
    hf = to_hf(config, state)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_config(config))).state_dict()
    expected = {name: value.shape for name, value in theirs.items() if not (tie and name == "lm_head.weight")}
    assert {name: value.shape for name, value in hf.items()} == expected
    back = from_hf(config, hf)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_each_part_of_a_merged_matrix_goes_to_its_place() -> None:
    config = tiny()
    state = model(config).state_dict()
    state["blocks.1.qkv.weight"] = torch.arange(64.0)[:, None].expand(64, 32)
    state["blocks.1.gate_up.weight"] = torch.arange(96.0)[:, None].expand(96, 32)
    hf = to_hf(config, state)
    first_rows = {
        name: hf[f"model.layers.1.{name}_proj.weight"][0, 0].item() for name in ("self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
    }
    assert first_rows == {"self_attn.k": 32, "self_attn.v": 48, "mlp.gate": 0, "mlp.up": 48}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_file_holds_the_rounded_weights_and_a_tied_head_once(tmp_path: Path, dtype: torch.dtype) -> None:
    config = tiny()
    state = model(config).state_dict()
    write_model(config, state, tmp_path, dtype)
    expected = to_hf(config, state)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(expected)
        assert all(torch.equal(file.get_tensor(name), expected[name].to(dtype)) for name in expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    generation = GenerationConfig.from_pretrained(tmp_path)
    assert (generation.pad_token_id, generation.bos_token_id, generation.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize(
    ("rope", "parameters", "scaling"),
    [
        (RopeConfig(theta=5e5), {"rope_type": "default", "rope_theta": 5e5}, None),
        (
            RopeConfig(scaling="linear", factor=4),
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            RopeConfig(scaling="ntk", factor=4),
            {"rope_type": "default", "rope_theta": raised_theta(RopeConfig(scaling="ntk", factor=4), 8, 32)},
            None,
        ),
    ],
    ids=lambda value: value.scaling if isinstance(value, RopeConfig) else "",
)
def test_rope_is_written_for_transformers_5_and_for_4(rope: RopeConfig, parameters: dict[str, Any], scaling: dict[str, Any] | None) -> None:
    written = hf_config(tiny(rope=rope))
    assert written["rope_parameters"] == parameters
    assert written["rope_theta"] == parameters["rope_theta"]
    assert written["rope_scaling"] == scaling


def test_yarn_is_written_with_the_original_length() -> None:
    written = hf_config(tiny(rope=RopeConfig(scaling="yarn", factor=4, beta_fast=16)))
    assert written["max_position_embeddings"] == 128
    assert written["rope_scaling"] | {"rope_theta": 1e4} == written["rope_parameters"]
    assert written["rope_scaling"]["original_max_position_embeddings"] == 32
    assert written["rope_scaling"]["beta_fast"] == 16


def test_llama3_is_written_as_meta_has_it() -> None:
    """``config.json`` of Llama 3.2 says this of RoPE; a length that follows from the factor is written as well."""
    rope = RopeConfig(theta=5e5, scaling="llama3", factor=32, max_seq_len=131_072)
    written = hf_config(tiny(original_seq_len=8192, rope=rope))
    assert (written["max_position_embeddings"], written["rope_theta"]) == (131_072, 5e5)
    assert written["rope_scaling"] == {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
    assert written["rope_parameters"] == written["rope_scaling"] | {"rope_theta": 5e5}
    assert hf_config(tiny(rope=RopeConfig(scaling="llama3", factor=8)))["max_position_embeddings"] == 256


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("scaling", ["none", "linear", "ntk", "yarn", "theta", "llama3"])
def test_either_spelling_of_rope_is_read_alike(tmp_path: Path, scaling: str, key: str) -> None:
    rope = RopeConfig.model_validate({"scaling": scaling, "factor": 1 if scaling == "none" else 4})
    written = hf_config(tiny(rope=rope))
    whole = AutoConfig.for_model(**written).rope_parameters
    left_out = ("rope_scaling", "rope_theta") if key == "rope_parameters" else ("rope_parameters",)
    (tmp_path / "config.json").write_text(json.dumps({name: value for name, value in written.items() if name not in left_out}))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == whole
