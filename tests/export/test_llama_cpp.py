"""What is written for llama.cpp: by its own reader, and by llama.cpp itself where it is installed (it compiles for many minutes)."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minifoundation.config import ModelConfig, RopeConfig, TokenizerConfig
from minifoundation.data.fast_tokenizer import FastTokenizer
from minifoundation.data.tokenizer import SentencePiece, Tokenizer, train_tokenizer
from minifoundation.errors import UserError
from minifoundation.export import llama_cpp
from minifoundation.export.verify import random_state
from minifoundation.model.transformer import Transformer
from tests.data.byte_level import EXAMPLE, byte_level, write_byte_level

gguf = pytest.importorskip("gguf")

TEXTS = [
    "To be, or not  to be\n\tthat 1234",
    "日本語 👩\u200d👩 e\u0301",
    "<s></s> <|endoftext|><unk>",
    "\0\x01",
    "",
    EXAMPLE.read_text(encoding="utf-8")[:20_000],
]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> SentencePiece:
    text = EXAMPLE.read_text(encoding="utf-8")[:60_000]
    return train_tokenizer([text], TokenizerConfig(kind="bpe", vocab_size=600), tmp_path_factory.mktemp("spm") / "tokenizer.model")


@pytest.fixture(scope="module")
def byte_pieces(tmp_path_factory: pytest.TempPathFactory) -> FastTokenizer:
    return fast(write_byte_level(tmp_path_factory.mktemp("fast"), bos=True))


def fast(folder: Path) -> FastTokenizer:
    tokenizer = Tokenizer.load(folder)
    assert isinstance(tokenizer, FastTokenizer)
    return tokenizer


def tiny(**changes: Any) -> ModelConfig:
    settings = {"vocab_size": 640, "d_model": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 96, "original_seq_len": 64}
    return ModelConfig.model_validate(settings | changes)


def weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    return random_state(Transformer(config).state_dict())


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray[Any, Any]]]:
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


def test_settings_and_weights_are_in_the_file(pieces: SentencePiece, tmp_path: Path) -> None:
    config = tiny(rope=RopeConfig(scaling="yarn", factor=4, beta_fast=16))
    state = weights(config)
    llama_cpp.write_gguf(config, state, pieces, tmp_path / "model.gguf", "f32")
    fields, tensors = read(tmp_path / "model.gguf")
    assert {name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")} == {
        "vocab_size": 640,
        "context_length": 256,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "rope.dimension_count": 16,
        "rope.freq_base": 10_000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 64,
        "rope.scaling.yarn_beta_fast": 16.0,
        "rope.scaling.yarn_beta_slow": 1.0,
    }
    assert np.array_equal(tensors["token_embd.weight"], state["embedding.weight"].numpy()) and "output.weight" not in tensors
    query = state["blocks.1.qkv.weight"][:64].unflatten(0, (4, 16)).numpy()
    theirs = tensors["blk.1.attn_q.weight"].reshape(4, 16, 64)
    assert np.array_equal(theirs[:, 0::2], query[:, :8]) and np.array_equal(theirs[:, 1::2], query[:, 8:]), "neighbours rotate together"
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_bos_token"] is True
    assert len(fields["tokenizer.ggml.tokens"]) == 640 and fields["tokenizer.ggml.add_space_prefix"] is False


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_matrices_are_rounded_and_norms_are_not(kind: llama_cpp.Kind, byte_pieces: FastTokenizer, tmp_path: Path) -> None:
    config = tiny(qk_norm=True, tie_embeddings=False)
    state = weights(config)
    llama_cpp.write_gguf(config, state, byte_pieces, tmp_path / "model.gguf", kind)
    fields, tensors = read(tmp_path / "model.gguf")
    rounded = llama_cpp.rounded(state, kind)
    for theirs, ours in (
        ("output.weight", "head.weight"),
        ("blk.0.ffn_down.weight", "blocks.0.down.weight"),
        ("output_norm.weight", "norm.weight"),
    ):
        assert np.array_equal(tensors[theirs], rounded[ours].numpy())
        assert np.allclose(tensors[theirs], state[ours].numpy(), rtol=0, atol=0.02) and ("norm" in ours) == torch.equal(
            rounded[ours], state[ours]
        )
    assert (fields["general.architecture"], fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("qwen3", "gpt2", "smollm")
    kinds = fields["tokenizer.ggml.token_type"]
    assert [kinds[token] for token in (0, 2, 3, 500, 501)] == [3, 3, 1, 4, 5], "control, control, normal, user-defined, unused"


def test_a_tokenizer_that_llama_cpp_reads_otherwise_is_refused(tmp_path: Path) -> None:
    text = EXAMPLE.read_text(encoding="utf-8")[:60_000]
    unigram = train_tokenizer([text], TokenizerConfig(vocab_size=600), tmp_path / "tokenizer.model")
    with pytest.raises(
        UserError, match=r"the tokenizer is Unigram, and llama.cpp ignores its byte fallback .* train with --tokenizer.kind bpe"
    ):
        llama_cpp.check_tokenizer(unigram)
    other = byte_level()
    other["pre_tokenizer"]["pretokenizers"][0] = {"type": "Punctuation", "behavior": "Isolated"}
    with pytest.raises(UserError, match=r"llama\.cpp has no name for how the tokenizer"):
        llama_cpp.check_tokenizer(Tokenizer.load(write_byte_level(tmp_path / "fast", tokenizer=other)))


def test_llama3_scaling_is_in_factors_of_the_frequencies_and_refused_where_they_are_not_read(pieces: SentencePiece, tmp_path: Path) -> None:
    config = tiny(rope=RopeConfig(scaling="llama3", factor=4, max_seq_len=128))
    llama_cpp.check_model(config, ["f16"])
    llama_cpp.write_gguf(config, weights(config), pieces, tmp_path / "model.gguf", "q8_0")
    fields, tensors = read(tmp_path / "model.gguf")
    assert fields["llama.context_length"] == 128 and "llama.rope.scaling.type" not in fields
    factors = tensors["rope_freqs.weight"]
    turns = 64 / (2 * np.pi) * 10_000.0 ** (-np.arange(8) / 8)  # over the original length
    expected = 1 / (1 / 4 + (1 - 1 / 4) * np.clip((turns - 1) / 3, 0, 1))
    assert np.allclose(factors, expected, rtol=1e-5) and factors[0] == 1 and factors[-1] == 4 and 1 < factors[2] < 4
    with pytest.raises(UserError, match=r"model.rope.scaling is llama3, which llama.cpp does not compute in models with QK-norm; leave"):
        llama_cpp.check_model(config.model_copy(update={"qk_norm": True}), ["f16"])


def test_widths_that_a_file_in_8_bits_cannot_hold_are_refused() -> None:
    llama_cpp.check_model(tiny(head_dim=12), ["f16"])
    llama_cpp.check_model(tiny(head_dim=24), ["f16", "q8_0"])
    with pytest.raises(
        UserError, match=r"q8_0 keeps numbers in blocks of 32, and model.n_head x head width 48 is not a multiple of that; take"
    ):
        llama_cpp.check_model(tiny(head_dim=12), ["f16", "q8_0"])


def compared(config: ModelConfig, tokenizer: Tokenizer, folder: Path, kind: llama_cpp.Kind = "f16") -> list[str]:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    state = weights(config)
    path = folder / "model.gguf"
    llama_cpp.write_gguf(config, state, tokenizer, path, kind)
    return llama_cpp.compared(config, state, tokenizer, {kind: path}, TEXTS).failures


@pytest.mark.parametrize(
    ("scaling", "qk_norm"), [*product(["none", "linear", "ntk", "yarn"], [False, True]), ("llama3", False)], ids=lambda value: str(value)
)
def test_llama_cpp_computes_what_was_trained(
    scaling: str, qk_norm: bool, pieces: Tokenizer, byte_pieces: FastTokenizer, tmp_path: Path
) -> None:
    rope = RopeConfig.model_validate({"scaling": scaling, "factor": 1 if scaling == "none" else 4})
    config = tiny(rope=rope, qk_norm=qk_norm, tie_embeddings=not qk_norm, head_dim=None if scaling == "none" else 24)
    assert compared(config, byte_pieces if qk_norm else pieces, tmp_path, "q8_0" if scaling == "none" else "f16") == []


def other_theta(config: ModelConfig) -> ModelConfig:
    return config.model_copy(update={"rope": config.rope.model_copy(update={"theta": config.rope.theta * 1.01})})


def other_epsilon(config: ModelConfig) -> ModelConfig:
    return config.model_copy(update={"norm_eps": 1e-6})


def no_scaling(config: ModelConfig) -> ModelConfig:
    return config.model_copy(update={"rope": RopeConfig()})


@pytest.mark.parametrize(
    ("fault", "scaling"), [(other_theta, "yarn"), (other_epsilon, "yarn"), (no_scaling, "yarn"), (no_scaling, "llama3")]
)
def test_a_fault_in_the_settings_is_found(
    fault: Callable[[ModelConfig], ModelConfig], scaling: str, pieces: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = llama_cpp.write_gguf
    monkeypatch.setattr(llama_cpp, "write_gguf", lambda config, *rest: right(fault(config), *rest))
    failures = compared(tiny(rope=RopeConfig.model_validate({"scaling": scaling, "factor": 4})), pieces, tmp_path)
    assert any("llama.cpp, f32, logits, row with random weights differs" in failure for failure in failures)


def test_the_layout_of_another_architecture_is_found(pieces: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    right = llama_cpp._tensors
    monkeypatch.setattr(llama_cpp, "_tensors", lambda _, state: right(tiny(n_head=8, n_kv_head=4), state))
    assert any("logits, row with random weights differs" in failure for failure in compared(config, pieces, tmp_path))


def test_a_fault_in_the_vocabulary_is_found(byte_pieces: FastTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = byte_pieces.merges
    monkeypatch.setattr(type(byte_pieces), "merges", right[::-1])
    failures = compared(tiny(qk_norm=True), byte_pieces, tmp_path)
    assert any("text 0: from token" in failure and "llama.cpp has" in failure for failure in failures)


def test_export_hf_writes_it_with_the_proof(tmp_path: Path, pieces: SentencePiece) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from minifoundation import cli
    from minifoundation.checkpoint import Checkpoint, save_final
    from minifoundation.config import DataConfig, RunConfig, TrainConfig

    config = tiny()
    run = RunConfig(model=config, data=DataConfig(source="examples"), train=TrainConfig(tokens=1000, seq_len=32))
    ckpt = save_final(Checkpoint(config=run, model=weights(config), tokenizer_model=pieces.model, progress={"step": 1}), tmp_path)
    out = tmp_path / "hf"
    assert cli.main(["export_hf", "--ckpt", str(ckpt), "--out_dir", str(out), "--gguf", "f16,q8_0"]) == 0
    assert {path.name for path in out.glob("*.gguf")} == {"model-f16.gguf", "model-q8_0.gguf"}
    parity = json.loads((out / "parity.json").read_text())
    assert len(parity["llama_cpp"]) == 6 and all(check["difference"] <= check["tolerance"] for check in parity["llama_cpp"])


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(UserError, match=r"llama_cpp is not installed; pip install -e '.\[gguf\]'"):
        llama_cpp.check_installed()
