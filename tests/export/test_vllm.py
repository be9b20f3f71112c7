"""vLLM's loader, where it is installed: it takes an export for what it is, and turns queries and keys by the same angles."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minifoundation.config import ModelConfig
from minifoundation.export.weights import write_model
from minifoundation.model.rope import rope_frequencies, rotary_tables
from minifoundation.model.transformer import Transformer

pytest.importorskip("vllm")


@pytest.mark.slow
@pytest.mark.parametrize("scaling", ["none", "linear", "ntk", "yarn", "llama3"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_vllm_reads_the_architecture_and_turns_by_the_same_angles(scaling: str, qk_norm: bool, tmp_path: Path) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope
    from vllm.model_executor.models import ModelRegistry
    from vllm.transformers_utils.config import get_config

    rope = {"scaling": scaling, "factor": 1 if scaling == "none" else 4, "beta_fast": 16}
    sizes = {"vocab_size": 640, "d_model": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 96, "original_seq_len": 64}
    config = ModelConfig.model_validate(sizes | {"qk_norm": qk_norm, "rope": rope, "head_dim": 32 if qk_norm else None})
    transformer = Transformer(config)
    transformer.initialise(0)
    write_model(config, transformer.state_dict(), tmp_path, torch.float32)
    read = get_config(str(tmp_path), trust_remote_code=False)
    assert read.architectures[0] in ModelRegistry.get_supported_archs()
    settings = {"max_position": read.max_position_embeddings, "rope_parameters": read.rope_parameters, "is_neox_style": True}
    with set_current_vllm_config(VllmConfig()):
        theirs = get_rope(read.head_dim, dtype=torch.float32, **settings).cos_sin_cache
    frequencies, gain = rope_frequencies(config.rope, config.head_width, config.original_seq_len)
    ours = torch.cat(rotary_tables(frequencies, gain, config.max_seq_len), dim=-1)
    torch.testing.assert_close(theirs[: len(ours)], ours, atol=1e-6, rtol=0)
