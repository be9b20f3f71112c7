"""Folders that transformers wrote compute the same here; what our model would not compute is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minifoundation.config import ModelConfig, RopeConfig
from minifoundation.errors import UserError
from minifoundation.export import reading
from minifoundation.export.verify import random_state
from minifoundation.export.weights import write_model
from minifoundation.model.transformer import Transformer

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "none": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


def written(folder: Path, kind: str = "llama", *, shard: str = "5GB", **changes: Any) -> Any:
    """Return a model of transformers with large random weights, saved to ``folder``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | changes)))
    state = model.state_dict()
    model.load_state_dict(random_state({name: value for name, value in state.items() if not name.endswith("lm_head.weight")}), strict=False)
    model.save_pretrained(folder, max_shard_size=shard)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(
    ("kind", "tied", "width"), [("llama", True, 16), ("llama", False, 32), ("qwen3", True, 32), ("qwen3", False, 16), ("qwen3", True, 12)]
)
def test_a_folder_of_transformers_computes_the_same_here(kind: str, tied: bool, width: int, scaling: str, tmp_path: Path) -> None:
    hf = written(tmp_path, kind, tie_word_embeddings=tied, rope_parameters=SCALINGS[scaling], rms_norm_eps=1e-3, head_dim=width)
    config = reading.model_config(tmp_path)
    native = Transformer(config)
    native.load_state_dict(reading.state_of(config, tmp_path))
    ids = torch.arange(60)[None] * 7 % 128
    theirs = hf(ids).logits
    assert (native.logits(ids) - theirs).abs().max() < 1e-4 * theirs.std()
    assert (config.max_seq_len, config.qk_norm, config.tie_embeddings, config.rope.scaling) == (64, kind == "qwen3", tied, scaling)
    assert (config.head_width, config.head_dim) == (width, None if width == 16 else width)


def test_many_files_are_read_like_one(tmp_path: Path) -> None:
    hf = written(tmp_path, shard="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    read = reading.tensors(tmp_path)
    assert all(torch.equal(read[name], value) for name, value in hf.state_dict().items() if name in read)
    config = reading.model_config(tmp_path)
    assert reading.state_of(config, tmp_path).keys() == Transformer(config).state_dict().keys()


@pytest.mark.parametrize("scaling", ["none", "linear", "ntk", "yarn", "llama3"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_an_export_is_read_back_with_its_settings(scaling: str, qk_norm: bool, tmp_path: Path) -> None:
    rope = RopeConfig.model_validate({"scaling": scaling, "factor": 1 if scaling == "none" else 4, "theta": 2e4})
    if scaling == "llama3" and qk_norm:
        rope = RopeConfig(scaling="llama3", factor=8, theta=2e4, low_freq_factor=0.5, high_freq_factor=3, max_seq_len=128)
    sizes = {"vocab_size": 96, "d_model": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 48, "original_seq_len": 32}
    more = {"qk_norm": qk_norm, "tie_embeddings": not qk_norm, "norm_eps": 1e-6, "head_dim": 16 if qk_norm else None}
    config = ModelConfig.model_validate(sizes | {"rope": rope} | more)
    transformer = Transformer(config)
    transformer.initialise(0)
    write_model(config, transformer.state_dict(), tmp_path, torch.float32, max_shard_bytes=10_000)
    read = reading.model_config(tmp_path)
    if scaling == "ntk":  # is a larger theta once it is exported
        assert (read.max_seq_len, read.rope.scaling) == (config.max_seq_len, "none") and read.rope.theta > 2e4
    else:
        assert read == config.model_copy(update={"init_std": config.weight_std})
    state = reading.state_of(read, tmp_path)
    assert all(torch.equal(state[name], value) for name, value in transformer.state_dict().items())


def in_config(**changes: Any) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return plant


def in_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({name: value.clone() for name, value in tensors.items()}, folder / "model.safetensors")

    return plant


def cut_file(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            in_config(model_type="mistral", architectures=["MistralForCausalLM"]),
            "the architecture is MistralForCausalLM; LlamaForCausalLM and",
        ),
        (in_config(hidden_act="gelu"), "hidden_act is gelu, which this program's model does not have"),
        (in_config(attention_bias=True), "attention_bias is True"),
        (in_config(mlp_bias=True), "mlp_bias is True"),
        (in_config(head_dim=32), r"self_attn.o_proj.weight is \(64, 64\), but \(64, 128\) by config.json"),
        (in_config(quantization_config={"quant_method": "fp8"}), "quantization_config is fp8"),
        (in_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "its RoPE has rope_type dynamic"),
        (
            in_config(rope_parameters=SCALINGS["yarn"] | {"attention_factor": 1.0}),
            "its RoPE has attention_factor 1 instead of 1.06931, which this program does not support",
        ),
        (in_config(rope_parameters=SCALINGS["yarn"] | {"truncate": False}), "its RoPE has truncate false"),
        (in_config(rope_parameters=SCALINGS["none"] | {"rope_theta": "x"}), "config.json: rope_theta is 'x', which is not a number"),
        (in_config(rope_parameters=SCALINGS["llama3"] | {"factor": float("nan")}), "factor is nan, which is not a number"),
        (in_config(vocab_size=130), "vocab_size"),
        (in_config(num_hidden_layers=3), r"the weights have no model.layers.2.input_layernorm.weight and 8 more"),
        (in_config(num_hidden_layers=1), r"the weights hold model.layers.1.input_layernorm.weight and 8 more, which"),
        (in_config(intermediate_size=88), r"model.layers.0.mlp.down_proj.weight is \(64, 96\), but \(64, 88\) by config.json"),
        (in_weights(lambda tensors: tensors.pop(NAME)), f"the weights have no {NAME}; copy the folder again"),
        (
            in_weights(lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.bias": torch.zeros(96)})),
            "the weights hold model.layers.0",
        ),
        (
            in_weights(lambda tensors: tensors.update({"lm_head.weight": torch.ones(128, 64)})),
            "config.json ties lm_head to the embedding, but the weights differ",
        ),
        (
            in_weights(lambda tensors: tensors["model.norm.weight"].fill_(math.nan)),
            "folder: model.norm.weight holds NaN or Inf; take weights",
        ),
        (cut_file, r"model.safetensors: is damaged"),
        (pickled, r"pytorch_model.bin: is not in the format of safetensors; load the folder with transformers and write it by save_pretr"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"folder: holds no weights \(model.safetensors, "),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config.json: is damaged: not a JSON object"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    ],
)
def test_what_is_not_our_model_is_refused_by_name(fault: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    written(folder, tie_word_embeddings=True)
    fault(folder)
    with pytest.raises(UserError, match=message):
        reading.state_of(reading.model_config(folder), folder)


def test_a_tied_head_that_is_stored_twice_is_read_once(tmp_path: Path) -> None:
    written(tmp_path, tie_word_embeddings=True)
    in_weights(lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))(tmp_path)
    config = reading.model_config(tmp_path)
    assert "head.weight" not in reading.state_of(config, tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        reading.model_config(tmp_path / "none")
