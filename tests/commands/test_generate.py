from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationMixin

from minifoundation.commands.export_hf import export_hf
from minifoundation.commands.generate import generate
from minifoundation.config import ExportOptions, GenerateOptions
from minifoundation.errors import UserError

PROMPT = "To be, or not  to be\n\tthat"


def printed(capsys: pytest.CaptureFixture[str], model: Path, **settings: Any) -> str:
    capsys.readouterr()
    generate(GenerateOptions.model_validate({"model": model, "prompt": PROMPT, "max_new_tokens": 20} | settings))
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_prompt_and_continuation_from_a_checkpoint_and_from_its_export(
    final: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ckpt = final()
    export_hf(ExportOptions(ckpt=ckpt, out_dir=tmp_path / "hf", dtype="fp32"))
    for temperature in (0.0, 1.0):
        text = printed(capsys, ckpt, temperature=temperature)
        assert text.startswith(PROMPT)
        assert len(text) > len(PROMPT) + 5
        assert text == printed(capsys, tmp_path / "hf", temperature=temperature)


def test_a_folder_with_damaged_weights_is_one_line(final: Callable[..., Path], tmp_path: Path) -> None:
    export_hf(ExportOptions(ckpt=final(), out_dir=tmp_path / "hf"))
    weights = tmp_path / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"hf/model\.safetensors: is damaged \(.*incomplete"):
        generate(GenerateOptions(model=tmp_path / "hf", prompt=PROMPT))


def test_a_model_that_a_gpu_cannot_hold_is_one_line(final: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **_options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(GenerationMixin, "generate", full)
    with pytest.raises(UserError, match=r"^--model: .*final\.pth in float32 .* memory of the GPU; run it on the CPU: put CUDA"):
        generate(GenerateOptions(model=final(), prompt=PROMPT))


def test_the_seed_decides_and_greedy_needs_none(final: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    ckpt = final()
    assert printed(capsys, ckpt, seed=1) == printed(capsys, ckpt, seed=1)
    assert printed(capsys, ckpt, seed=1) != printed(capsys, ckpt, seed=2)
    assert printed(capsys, ckpt, seed=1, temperature=0) == printed(capsys, ckpt, seed=2, temperature=0)
    assert printed(capsys, ckpt, temperature=1e-40) == printed(capsys, ckpt, temperature=0)


def test_greedy_is_the_best_token_of_our_own_model(final: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    from minifoundation.checkpoint import load_checkpoint
    from minifoundation.commands.export_hf import native_tokenizer
    from minifoundation.data.tokenizer import BOS, EOS
    from minifoundation.export.tokenizer import write_tokenizer
    from minifoundation.model.transformer import Transformer

    ckpt = final(init_std=0.15)
    checkpoint = load_checkpoint(ckpt)
    model = Transformer(checkpoint.config.model)
    model.load_state_dict(checkpoint.model)
    with native_tokenizer(checkpoint) as tokenizer, torch.no_grad():
        ids = [BOS, *tokenizer.encode(PROMPT)]
        for _ in range(20):
            best = int(model.logits(torch.tensor([ids]))[0, -1, : tokenizer.vocab_size].argmax())
            ids.append(best)
            if best == EOS:
                break
        write_tokenizer(tokenizer, tmp_path / "tokenizer", max_seq_len=64)
    expected = AutoTokenizer.from_pretrained(tmp_path / "tokenizer").decode(ids, skip_special_tokens=True)
    assert printed(capsys, ckpt, temperature=0) == expected + "\n"


def test_it_stops_at_the_end_of_text_and_at_the_end_of_the_context(final: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    ckpt = final(tie_embeddings=False)
    payload = torch.load(ckpt)
    head = payload["model"]["head.weight"]
    printed(capsys, ckpt, max_new_tokens=5000, temperature=0)  # ends by itself: the context is 64 tokens
    payload["model"]["norm.weight"].zero_()  # every logit is 0 now, and the first of equals is chosen
    head.zero_()
    torch.save(payload, ckpt)
    ckpt.with_name("final.json").unlink()  # the hash of what it was
    assert printed(capsys, ckpt, temperature=0).rstrip("\n") == PROMPT


def test_bad_input(final: Callable[..., Path], tmp_path: Path) -> None:
    def options(model: Path, prompt: str = "x") -> GenerateOptions:
        return GenerateOptions(model=model, prompt=prompt)

    with pytest.raises(UserError, match="no such file or folder"):
        generate(options(tmp_path / "none"))
    (tmp_path / "text.pth").write_text("no checkpoint")
    with pytest.raises(UserError, match="not a checkpoint"):
        generate(options(tmp_path / "text.pth"))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match=r"hf: holds no weights"):
        generate(options(tmp_path / "hf"))
    with pytest.raises(UserError, match=r"1,001 tokens.* but the context is 64; shorten the prompt"):
        generate(options(final(), "\x00" * 1000))
