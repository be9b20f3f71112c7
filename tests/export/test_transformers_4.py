"""The other major version of transformers reads exports alike: one is installed beside, and asked in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from minifoundation.config import ModelConfig, TokenizerConfig
from minifoundation.data.tokenizer import SentencePiece, Tokenizer, train_tokenizer
from minifoundation.export.tokenizer import write_tokenizer
from minifoundation.export.verify import random_state
from minifoundation.export.weights import write_model
from minifoundation.model.transformer import Transformer
from tests.data.byte_level import EXAMPLE, write_byte_level

PACKAGES = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")
IDS = torch.arange(100)[None] * 7 % 640
TEXTS = ["To be, or not  to be\n\tthat 1234", "日本語 👩\u200d👩 e\u0301 \u2581", "literal </s><s> <|endoftext|> <unk>", "\0\x01", ""]
PROGRAM = """
import sys
import numpy, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4."), transformers.__version__
ids, texts = torch.arange(100)[None] * 7 % 640, {texts!r}
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    with torch.no_grad():
        logits = model(ids).logits.numpy()
    decoded = tokenizer.decode(tokenizer.encode(texts[0]), skip_special_tokens=True)
    found = {{str(n): numpy.array(tokenizer.encode(text), dtype=numpy.int64) for n, text in enumerate(texts)}}
    numpy.savez(folder + "/found.npz", logits=logits, decoded=decoded, **found)
"""


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("packages")
    line = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place), *PACKAGES]
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)
    if done.returncode:
        pytest.skip(f"{PACKAGES[0]} cannot be installed here: {done.stderr.splitlines()[-1] if done.stderr else done.returncode}")
    return place


@pytest.mark.slow
def test_transformers_4_computes_and_encodes_the_same(old: Path, tmp_path: Path) -> None:
    text = EXAMPLE.read_text(encoding="utf-8")[:60_000]
    unigram: SentencePiece = train_tokenizer([text], TokenizerConfig(vocab_size=600), tmp_path / "tokenizer.model")
    byte_level = Tokenizer.load(write_byte_level(tmp_path / "fast", bos=True))
    expected = {}
    for scaling in ("none", "linear", "ntk", "yarn", "llama3"):
        for qk_norm in (False, True):
            rope = {"scaling": scaling, "factor": 1 if scaling == "none" else 4, "beta_fast": 16}
            sizes = {"vocab_size": 640, "d_model": 64, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 96, "original_seq_len": 64}
            tied, tokenizer = qk_norm == (scaling in ("none", "yarn")), byte_level if qk_norm else unigram
            more = {"qk_norm": qk_norm, "tie_embeddings": tied, "head_dim": 24 if tied else None}
            config = ModelConfig.model_validate(sizes | {"rope": rope} | more)
            transformer = Transformer(config)
            transformer.load_state_dict(random_state(transformer.state_dict()))
            folder = tmp_path / f"{scaling}-{qk_norm}"
            write_tokenizer(tokenizer, folder, max_seq_len=config.max_seq_len)
            write_model(config, transformer.state_dict(), folder, torch.float32, tokenizer.special, max_shard_bytes=100_000)
            with torch.no_grad():
                expected[folder] = transformer.logits(IDS).numpy(), tokenizer
    line = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(texts=TEXTS), *map(str, expected)]
    done = subprocess.run(line, env={**os.environ, "PYTHONPATH": str(old)}, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, (logits, tokenizer) in expected.items():
        found = np.load(folder / "found.npz")
        assert np.abs(found["logits"] - logits).max() < 1e-4 * logits.std(), folder.name
        for number, one in enumerate(TEXTS):
            assert found[str(number)].tolist() == [*tokenizer.prefix, *tokenizer.encode(one)], (folder.name, one)
        assert str(found["decoded"]) == TEXTS[0]
