"""``import_hf``: a Llama or Qwen3 folder of Hugging Face becomes a checkpoint to train on from, or nothing when they are not equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from minifoundation.checkpoint import REMEDY, Checkpoint, load_checkpoint, save_final
from minifoundation.commands.export_hf import TEXTS, folder_written_whole, text_report
from minifoundation.config import REPOSITORY, DataConfig, ImportOptions, ModelConfig, RunConfig, TrainConfig
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.distributed import is_first_process
from minifoundation.errors import UserError
from minifoundation.export import reading, verify
from minifoundation.export.tokenizer import tokenizer_differences
from minifoundation.hf_folder import CONFIG, read_config
from minifoundation.model.transformer import Transformer
from minifoundation.train.state import Progress

PHASE = "import"
"""``Progress.phase`` of a model that came from elsewhere: its checkpoint has the settings of a model, and those of no run."""
UNEQUAL = "the imported model is not that of the folder"
SPARE_ROWS = 1_024
"""Rows of the embedding that a vocabulary may leave unused: padding to a round number, of which Qwen has the most (267 to 421)."""


def import_hf(options: ImportOptions) -> None:
    """Write ``final.pth`` and ``parity.json`` into ``options.out_dir`` after the check has passed.

    Raises:
        UserError: no such folder, another architecture, weights or a tokenizer that do not belong, a failed check, or a folder to write
            with something in it.
    """
    with folder_written_whole(options.out_dir) as folder:
        checkpoint, report = imported(options.model_path)
        save_final(checkpoint, folder)
        (folder / "parity.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{options.out_dir / 'final.pth'}: equal to {options.model_path} ({in_words(report)})")


def beginning(path: Path) -> Checkpoint:
    """Return the checkpoint in ``path``, or that of the Hugging Face folder there, which is compared with it first.

    Raises:
        UserError: neither is there, or as ``import_hf``.
    """
    if not (path / CONFIG).is_file():
        try:
            return load_checkpoint(path)
        except UserError as error:
            if error.remedy != REMEDY:
                raise
            if path.is_file() and (path.parent / CONFIG).is_file():
                remedy = f"did you mean the folder, {path.parent}?"
            else:
                remedy = f"{REMEDY}, or a folder of Hugging Face on this machine"
            raise UserError(error.where, error.problem, remedy) from None
    checkpoint, report = imported(path)
    if is_first_process():
        print(f"{path}: imported and equal ({in_words(report)})")
    return checkpoint


def imported(folder: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """Return the checkpoint of a folder, float32, and the content of ``parity.json``."""
    config = reading.model_config(folder)
    tokenizer = Tokenizer.load(folder)
    _belongs(tokenizer, config, folder)
    state = reading.state_of(config, folder)
    transformer = Transformer(config)
    transformer.load_state_dict(state)
    texts = [*TEXTS, *plays()]
    with verify.quiet_transformers():
        verify.refuse_unequal(tokenizer_differences(tokenizer, folder, texts, split_special_tokens=True), UNEQUAL)
    parity = verify.verify(transformer, config, folder, dtype=torch.float32, unequal=UNEQUAL)
    run = RunConfig(
        model=config,
        data=DataConfig(source=str(folder)),
        train=TrainConfig(tokens=1, seq_len=min(config.max_seq_len, TrainConfig.model_fields["seq_len"].default)),
    )
    checkpoint = Checkpoint(run, state, tokenizer.model, Progress(phase=PHASE, imported_from=str(folder)).as_dict())
    return checkpoint, verify.report(parity, torch.float32) | text_report(texts)


def plays() -> list[str]:
    """Return a megabyte of text, where this package is used from its clone."""
    return [path.read_text(encoding="utf-8") for path in (REPOSITORY / "examples").glob("shakespeare.txt")]


def in_words(report: dict[str, Any]) -> str:
    """Return the content of ``parity.json`` for a person."""
    worst = max(check["difference"] for check in report["checks"])
    logits = f"{len(report['checks'])} comparisons of logits, largest difference {worst:.1e}"
    return f"{logits}; token ids of {report['text_bytes'] / 1e6:.1f} MB of text"


def settings_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the settings that a later phase inherits: those of the run; an imported model had none, and leaves its own alone."""
    settings = checkpoint.config.model_dump(mode="json")
    settings["tokenizer"]["path"] = None
    return {"model": settings["model"]} if checkpoint.progress.get("phase") == PHASE else settings


def _belongs(tokenizer: Tokenizer, config: ModelConfig, folder: Path) -> None:
    """Refuse a tokenizer that is not the model's."""
    pieces, rows = tokenizer.vocab_size, config.vocab_size
    if not pieces <= rows < pieces + SPARE_ROWS:
        problem = f"the tokenizer has {pieces:,} pieces, and the model {rows:,} rows for them"
        raise UserError(str(folder), problem, "copy the tokenizer of this very model into the folder")
    ends = read_config(folder).get("eos_token_id")
    known = ends if isinstance(ends, list) else [ends]
    if ends is not None and tokenizer.special.eos not in known:
        named = tokenizer.special_tokens["eos_token"]
        problem = f"the tokenizer's eos_token {named} is {tokenizer.special.eos}, and eos_token_id in config.json {ends}"
        raise UserError(str(folder), problem, "copy the tokenizer of this very model into the folder, or correct eos_token_id")
