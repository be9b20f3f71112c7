from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minifoundation.config import ModelConfig, RopeConfig
from minifoundation.data.tokenizer import SPECIAL
from minifoundation.errors import UserError
from minifoundation.export import verify, weights
from minifoundation.model.transformer import Transformer


def tiny(**changes: Any) -> ModelConfig:
    settings = {"vocab_size": 256, "d_model": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 96, "original_seq_len": 48}
    return ModelConfig.model_validate(settings | changes)


def exported(config: ModelConfig, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Transformer:
    transformer = Transformer(config)
    transformer.initialise(0)
    weights.write_model(config, transformer.state_dict(), folder, dtype)
    return transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("scaling", ["none", "linear", "ntk", "yarn", "theta", "llama3"])
def test_an_export_is_equal(tmp_path: Path, scaling: str, qk_norm: bool, dtype: torch.dtype) -> None:
    rope = RopeConfig.model_validate({"scaling": scaling, "factor": 1 if scaling == "none" else 4})
    config = tiny(rope=rope, qk_norm=qk_norm, tie_embeddings=not qk_norm)
    parity = verify.verify(exported(config, tmp_path, dtype), config, tmp_path, dtype=dtype)
    assert parity.failures == []
    seen = {(check.weights, check.what, check.tokens) for check in parity.checks}
    long = ("row full length", 48) if scaling == "none" else ("row beyond the original length", 192)
    for name in ("exported", "random"):
        assert seen >= {(name, "short row", 24), (name, *long), (name, "left-padded batch", 24), (name, "greedy continuation", 24)}
    assert json.loads(json.dumps(verify.report(parity, dtype)))["equal"] is True


def in_config(**changes: Any) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        path = folder / "config.json"
        found = json.loads(path.read_text())
        for name, value in changes.items():
            if name in ("rope_theta", "attention_factor"):
                found["rope_parameters"][name] = value
                if found["rope_scaling"]:
                    found["rope_scaling"][name] = value
            found[name] = value
        path.write_text(json.dumps(found))

    return plant


def in_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return plant


def one_bit(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"].view(torch.int16)[3] += 1


def no_norm(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        pytest.param(in_config(rope_theta=10_100.0), "random weights", id="theta off by 1%"),
        pytest.param(in_config(attention_factor=1.0), "differs by", id="YaRN gain forgotten"),
        pytest.param(in_config(rms_norm_eps=1e-6), "differs by", id="epsilon of the norms"),
        pytest.param(in_config(tie_word_embeddings=False), "differs by", id="tie broken"),
        pytest.param(in_config(bos_token_id=2), "config.json has bos_token_id 2 instead of 1", id="wrong BOS"),
        pytest.param(in_tensors(one_bit), "norm.weight in the folder is another", id="one bit of one weight"),
        pytest.param(in_tensors(no_norm), "the folder has no model.norm.weight", id="weight missing"),
    ],
)
def test_a_planted_fault_is_found(tmp_path: Path, plant: Callable[[Path], None], message: str) -> None:
    config = tiny(rope=RopeConfig(scaling="yarn", factor=4))
    transformer = exported(config, tmp_path)
    plant(tmp_path)
    with pytest.raises(UserError, match=message):
        verify.verify(transformer, config, tmp_path, dtype=torch.bfloat16, special=SPECIAL)


def test_freshly_initialised_weights_alone_would_not_show_a_wrong_theta(tmp_path: Path) -> None:
    """Why the comparison is made a second time with large random weights."""
    config = tiny()
    transformer = exported(config, tmp_path, torch.float32)
    in_config(rope_theta=10_050.0)(tmp_path)
    checks = verify._exported(config, transformer.state_dict(), tmp_path)
    assert all(check.difference < verify.TOLERANCE for check in checks)


def test_the_long_row_is_bounded_by_work() -> None:
    half_billion = ModelConfig(d_model=1536, n_layer=16, n_head=24, n_kv_head=8, d_ff=4096, rope=RopeConfig(scaling="yarn", factor=4))
    assert verify._longest(tiny(), 1e11) == 48
    assert 200 < verify._longest(half_billion, verify.BUDGET["exported"]) < 300
    for width, heads, d_ff in ((1536, 24, 4096), (2048, 32, 5504)):
        shallow = half_billion.model_copy(update={"n_layer": verify.RANDOM_LAYERS, "d_model": width, "n_head": heads, "d_ff": d_ff})
        assert verify._longest(shallow, verify.BUDGET["random"]) > 4096, "random weights are compared beyond the original length"


def test_transformers_is_loud_again_after() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with verify.quiet_transformers():
        assert logging.get_verbosity() == logging.CRITICAL
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
