"""``export_hf``: a checkpoint becomes a Hugging Face folder, or nothing at all when the two are not equal."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm.auto import tqdm

from minifoundation.checkpoint import Checkpoint, load_checkpoint
from minifoundation.config import ExportOptions
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.errors import UserError
from minifoundation.export import tokenizer as hf_tokenizer
from minifoundation.export import verify, weights
from minifoundation.model.transformer import Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(x):\n\treturn {'a': x[0], \"b\": 1e-5}  # two  spaces\n\n\n",
    "line one\r\nline two\r\n   indented    and trailing   ",
    "Zażółć gęślą jaźń. Ünïcödé, naïve, e\u0301 and é.",
    "日本語のテキスト、中文文本。한국어 텍스트",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 \u200b\u200d\ufeff",
    "literal </s> <s> <unk> <pad> <0x0A> \u2581 tokens",
    "\x00\x01\x1b[0m\x7f",
    "a" * 3000,
    " ",
    "",
)
"""Texts whose ids must be the same before and after the export."""


def export_hf(options: ExportOptions) -> None:
    """Write ``options.out_dir``: weights, configs, tokenizer and ``parity.json``, put in place only after the check has passed.

    Raises:
        UserError: no such checkpoint, a folder with something in it, averaged weights that are not there, or a failed check.
    """
    out_dir = options.out_dir
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError("--out_dir", f"{out_dir} exists and is not empty", "give another folder, or remove it first")
    checkpoint = load_checkpoint(options.ckpt)
    if options.ema and checkpoint.ema is None:
        raise UserError("--ema", f"{options.ckpt} holds no averaged weights", "leave --ema away, or train with --train.ema 0.999")
    part = out_dir.resolve().with_name(out_dir.resolve().name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        parity = _write(checkpoint, part, ema=options.ema, dtype=DTYPES[options.dtype])
        if out_dir.exists():
            out_dir.rmdir()
        part.replace(out_dir)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    worst = max(check.difference for check in parity.checks)
    print(
        f"{out_dir}: {options.dtype}, equal to {options.ckpt} ({len(parity.checks)} comparisons of logits, largest difference {worst:.1e})"
    )


def _write(checkpoint: Checkpoint, folder: Path, *, ema: bool, dtype: torch.dtype) -> verify.Parity:
    config = checkpoint.config.model
    state = checkpoint.ema if ema and checkpoint.ema is not None else checkpoint.model
    transformer = Transformer(config)
    transformer.load_state_dict(state)
    with tqdm(total=4, desc="export", unit="part", leave=False) as bar:
        bar.set_postfix_str("weights")
        weights.write_model(config, state, folder, dtype)
        bar.update()
        with native_tokenizer(checkpoint) as native:
            bar.set_postfix_str("tokenizer")
            hf_tokenizer.write_tokenizer(native, folder, max_seq_len=config.max_seq_len)
            bar.update()
            bar.set_postfix_str("comparing token ids")
            verify.refuse_unequal(hf_tokenizer.tokenizer_differences(native, folder, TEXTS))
            bar.update()
        bar.set_postfix_str("comparing logits")
        parity = verify.verify(transformer, config, folder, dtype=dtype)
        bar.update()
    report = verify.report(parity, dtype) | {"texts_with_equal_token_ids": len(TEXTS), "weights": "ema" if ema else "trained"}
    report |= {"trained_tokens": trained_tokens(checkpoint)}
    (folder / "parity.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return parity


def trained_tokens(checkpoint: Checkpoint) -> int:
    """Return how many tokens all phases up to a checkpoint have read."""
    return sum(entry["samples"] * entry["seq_len"] for entry in checkpoint.ledger) or int(checkpoint.progress.get("tokens", 0))


@contextmanager
def native_tokenizer(checkpoint: Checkpoint) -> Iterator[Tokenizer]:
    """Give the tokenizer the checkpoint carries; its file is there as long as the context is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(checkpoint.tokenizer_model)
        yield Tokenizer.load(path)
