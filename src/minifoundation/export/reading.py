"""A folder in Hugging Face's form as settings and weights of ours; whatever our model would compute otherwise is refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minifoundation.config import ModelConfig, build
from minifoundation.errors import UserError
from minifoundation.export.weights import from_hf, to_hf
from minifoundation.hf_folder import CONFIG, read_config, weight_files
from minifoundation.model.rope import yarn_gain
from minifoundation.model.transformer import Transformer

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROPE_NUMBERS = ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow")


def model_config(folder: Path) -> ModelConfig:
    """Return the settings of the model in ``folder``.

    Raises:
        UserError: no such folder, another architecture, or a part of it that our model does not have.
    """
    from transformers import AutoConfig

    path = folder / CONFIG
    if not path.is_file():
        problem = f"has no {CONFIG}" if folder.is_dir() else "no such folder"
        raise UserError(str(folder), problem, "give a folder that save_pretrained of transformers or export_hf wrote")
    written = read_config(folder)
    kind = written["model_type"]
    if kind not in ARCHITECTURES:
        named = (written.get("architectures") or [kind])[0]
        raise UserError(str(path), f"the architecture is {named}", f"{' and '.join(ARCHITECTURES.values())} can be imported")
    try:
        hf = AutoConfig.from_pretrained(folder)
    except Exception as error:  # a value of a wrong type fails in many ways
        raise UserError(str(path), f"transformers does not read it ({str(error).splitlines()[0]})", "mend it") from None
    for name, found in _foreign(hf, written):
        raise UserError(str(path), f"{name} is {found}, which this program's model does not have", "take a model without it")
    width = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    return build(
        ModelConfig,
        {
            "vocab_size": hf.vocab_size,
            "d_model": hf.hidden_size,
            "n_layer": hf.num_hidden_layers,
            "n_head": hf.num_attention_heads,
            "n_kv_head": hf.num_key_value_heads,
            "head_dim": None if width * hf.num_attention_heads == hf.hidden_size else width,
            "d_ff": hf.intermediate_size,
            "norm_eps": hf.rms_norm_eps,
            "qk_norm": kind == "qwen3",
            "tie_embeddings": hf.tie_word_embeddings,
            "init_std": hf.initializer_range,
            **_rope(hf, path),
        },
        str(path),
    )


def _foreign(hf: Any, written: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the settings under which a model is not ours, with their values."""
    others = {kind for kind in getattr(hf, "layer_types", None) or () if kind != "full_attention"}
    found = {
        "hidden_act": (hf.hidden_act, hf.hidden_act == "silu"),
        "attention_bias": (hf.attention_bias, not hf.attention_bias),
        "mlp_bias": (getattr(hf, "mlp_bias", False), not getattr(hf, "mlp_bias", False)),
        "layer_types": (", ".join(sorted(others)), not others),
        "quantization_config": ((written.get("quantization_config") or {}).get("quant_method"), not written.get("quantization_config")),
    }
    return [(name, value) for name, (value, ours) in found.items() if not ours]


def _rope(hf: Any, path: Path) -> dict[str, Any]:
    """Return ``rope`` and ``original_seq_len``."""
    rope, length = hf.rope_parameters, hf.max_position_embeddings
    for name in ("rope_theta", *(name for name in ROPE_NUMBERS if rope.get(name) is not None)):
        value = rope.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(str(path), f"{name} is {value!r}, which is not a number", "correct it, or copy the folder again")
    theta, factor = float(rope["rope_theta"]), float(rope.get("factor") or 1.0)
    original = rope.get("original_max_position_embeddings")
    fault = None
    match rope["rope_type"]:
        case "default":
            return {"rope": {"theta": theta}, "original_seq_len": length}
        case "linear":
            # A scaled config.json states the longer length; the factor says of how much.
            return {
                "rope": {"theta": theta, "scaling": "linear", "factor": factor},
                "original_seq_len": original or math.ceil(length / factor),
            }
        case "yarn":
            gain = rope.get("attention_factor")
            if gain is not None and not math.isclose(gain, yarn_gain(factor), rel_tol=1e-6):
                fault = f"attention_factor {gain:g} instead of {yarn_gain(factor):.6g}"
            elif rope.get("mscale") or rope.get("mscale_all_dim"):
                fault = "mscale"
            elif rope.get("truncate") is False:
                fault = "truncate false"
            else:
                betas = {"beta_fast": rope.get("beta_fast") or 32.0, "beta_slow": rope.get("beta_slow") or 1.0}
                return {"rope": {"theta": theta, "scaling": "yarn", "factor": factor, **betas}, "original_seq_len": original or length}
        case "llama3":
            original = original or length
            bands = {"low_freq_factor": rope["low_freq_factor"], "high_freq_factor": rope["high_freq_factor"]}
            reach = {} if length == math.floor(original * factor) else {"max_seq_len": length}
            return {"rope": {"theta": theta, "scaling": "llama3", "factor": factor, **bands, **reach}, "original_seq_len": original}
        case other:
            fault = f"rope_type {other}"
    raise UserError(
        str(path), f"its RoPE has {fault}, which this program does not support", "default, linear, yarn and llama3 can be imported"
    )


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of the weights in ``folder`` as it is stored.

    Raises:
        UserError: a file is missing, damaged or of another format.
    """
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        if file.suffix != ".safetensors":
            remedy = "load the folder with transformers and write it by save_pretrained"
            raise UserError(str(file), "is not in the format of safetensors", remedy)
        found |= load_file(file)
    return found


def state_of(config: ModelConfig, folder: Path) -> dict[str, Tensor]:
    """Return the weights in ``folder`` by our names, float32.

    Raises:
        UserError: a tensor is missing, has another shape than ``config.json`` says, is none of this architecture, or holds NaN or Inf.
    """
    hf = tensors(folder)
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in to_hf(config, Transformer(config).state_dict()).items()}
    head, embedding = hf.get("lm_head.weight"), hf.get("model.embed_tokens.weight")
    if config.tie_embeddings and head is not None and embedding is not None:
        if not torch.equal(head, embedding):
            raise UserError(str(folder), "config.json ties lm_head to the embedding, but the weights differ", "correct tie_word_embeddings")
        del hf["lm_head.weight"]
    missing = [name for name in expected if name not in hf]
    if missing:
        raise UserError(str(folder), f"the weights have no {_some(missing)}", "copy the folder again, or correct its config.json")
    for name, shape in expected.items():
        if tuple(hf[name].shape) != shape:
            raise UserError(
                str(folder),
                f"{name} is {tuple(hf[name].shape)}, but {shape} by config.json",
                "correct config.json, or copy the folder again",
            )
    more = [name for name in hf if name not in expected and not name.endswith("rotary_emb.inv_freq")]
    if more:
        raise UserError(str(folder), f"the weights hold {_some(more)}, which this program's model does not have", "take a model without")
    state = {name: hf[name].float() for name in expected}
    if broken := [name for name, value in state.items() if not value.isfinite().all()]:
        raise UserError(str(folder), f"{_some(broken)} holds NaN or Inf", "take weights that are whole, or train these again")
    return from_hf(config, state)


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
