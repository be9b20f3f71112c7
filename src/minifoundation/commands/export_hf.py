"""``export_hf``: a checkpoint becomes a Hugging Face folder, or nothing at all when the two are not equal."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from minifoundation.checkpoint import Checkpoint, load_checkpoint
from minifoundation.config import ExportOptions, ModelConfig
from minifoundation.data import survey
from minifoundation.data.shards import MANIFEST, Shards
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.errors import UserError
from minifoundation.export import llama_cpp, verify, weights
from minifoundation.export import tokenizer as hf_tokenizer
from minifoundation.lock import LOCK, held
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
"""Texts whose ids must be the same before and after the export, beside held-out text of the run."""
COMPARED_BYTES = 4_000_000
"""Of held-out text of each source: a few seconds."""


def export_hf(options: ExportOptions) -> None:
    """Write ``options.out_dir``: weights, configs, tokenizer and ``parity.json``, put in place only after the check has passed.

    Raises:
        UserError: no such checkpoint, a folder with something in it, averaged weights that are not there, or a failed check.
    """
    with folder_written_whole(options.out_dir) as folder:
        checkpoint = load_checkpoint(options.ckpt)
        if options.ema and checkpoint.ema is None:
            raise UserError("--ema", f"{options.ckpt} holds no averaged weights", "leave --ema out, or train with --train.ema 0.999")
        parity = _write(checkpoint, folder, options)
    print(f"{options.out_dir}: {options.dtype}, equal to {options.ckpt} ({verify.in_words(parity)})")


@contextmanager
def folder_written_whole(out_dir: Path) -> Iterator[Path]:
    """Give a new folder that takes the place of ``out_dir`` at the end; nothing is left when something goes wrong.

    Raises:
        UserError: there is something in ``out_dir``, or another process writes it.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError("--out_dir", f"{out_dir} exists and is not empty", "give another folder, or remove it first")
    place = out_dir.resolve()
    part = next(parent for parent in place.parents if parent.exists()) / f"{place.name}.part"
    with held(part):
        for left in part.iterdir():  # by one that was killed
            if left.name != LOCK:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield part
            (part / LOCK).unlink()
            if place.exists():
                place.rmdir()
            place.parent.mkdir(parents=True, exist_ok=True)
            part.replace(place)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def _write(checkpoint: Checkpoint, folder: Path, options: ExportOptions) -> verify.Parity:
    config, dtype = checkpoint.config.model, DTYPES[options.dtype]
    state = checkpoint.ema if options.ema and checkpoint.ema is not None else checkpoint.model
    transformer = Transformer(config)
    transformer.load_state_dict(state)
    with native_tokenizer(checkpoint) as native, tqdm(total=4 + bool(options.gguf), desc="export", unit="part", leave=False) as bar:
        if options.gguf:
            llama_cpp.check_model(config, options.gguf)
            llama_cpp.check_installed()
            llama_cpp.check_tokenizer(native)
        bar.set_postfix_str("weights")
        weights.write_model(config, state, folder, dtype, native.special, max_shard_bytes=options.max_shard_bytes)
        bar.update()
        bar.set_postfix_str("tokenizer")
        hf_tokenizer.write_tokenizer(native, folder, max_seq_len=config.max_seq_len)
        bar.update()
        bar.set_postfix_str("comparing token ids")
        texts = [*TEXTS, *held_out_texts(checkpoint, native)]
        verify.refuse_unequal(hf_tokenizer.tokenizer_differences(native, folder, texts))
        bar.update()
        bar.set_postfix_str("comparing logits")
        parity = verify.verify(transformer, config, folder, dtype=dtype, special=native.special)
        bar.update()
        if options.gguf:
            bar.set_postfix_str("comparing llama.cpp")
            gguf = _gguf(config, state, native, folder, options, texts)
            bar.update()
    report = verify.report(parity, dtype) | text_report(texts)
    report |= {"weights": "ema" if options.ema else "trained", **trained(checkpoint)}
    if options.gguf:
        report |= {"llama_cpp": gguf}
    (folder / "parity.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return parity


def _gguf(
    config: ModelConfig, state: Mapping[str, Tensor], tokenizer: Tokenizer, folder: Path, options: ExportOptions, texts: Sequence[str]
) -> list[dict[str, Any]]:
    """Write the files of llama.cpp, from the weights as the folder has them, and return what was compared."""
    exported = {name: value.detach().to("cpu", DTYPES[options.dtype]).float() for name, value in state.items()}
    files: dict[llama_cpp.Kind, Path] = {kind: folder / f"model-{kind}.gguf" for kind in options.gguf}
    for kind, path in files.items():
        llama_cpp.write_gguf(config, exported, tokenizer, path, kind)
    parity = llama_cpp.compared(config, exported, tokenizer, files, texts)
    verify.refuse_unequal(parity.failures, "llama.cpp computes something else than was trained")
    return [asdict(check) for check in parity.checks]


def held_out_texts(checkpoint: Checkpoint, tokenizer: Tokenizer) -> list[str]:
    """Return text of the held-out splits the run had, as far as its shards are still there: ``COMPARED_BYTES`` of each source at most."""
    found = []
    for folder in {entry["source"]: Path(entry["folder"]) for entry in checkpoint.ledger}.values():
        if (folder / MANIFEST).exists() and (shards := Shards.open(folder)).manifest.tokenizer_sha256 == tokenizer.sha256:
            found += survey.texts(shards.held_out, tokenizer, COMPARED_BYTES)
    return found


def text_report(texts: Sequence[str]) -> dict[str, int]:
    """Return what ``parity.json`` says of the texts whose ids were compared."""
    return {"texts_with_equal_token_ids": len(texts), "text_bytes": sum(len(text.encode()) for text in texts)}


def trained(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what is known of the training tokens of a checkpoint, for ``parity.json`` and ``results.json``.

    ``trained_tokens`` of all phases up to it; None where the first began from imported weights, since what those had read is not known:
    then ``imported_from`` names their folder, and ``tokens_since_import`` counts.
    """
    tokens = sum(entry["samples"] * entry["seq_len"] for entry in checkpoint.ledger) or int(checkpoint.progress.get("tokens", 0))
    origin = checkpoint.progress.get("imported_from")
    if origin is None:
        return {"trained_tokens": tokens}
    return {"trained_tokens": None, "imported_from": origin, "tokens_since_import": tokens}


@contextmanager
def native_tokenizer(checkpoint: Checkpoint) -> Iterator[Tokenizer]:
    """Give the tokenizer the checkpoint carries; its file is there as long as the context is."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(checkpoint.tokenizer_model)
        yield Tokenizer.load(path)
