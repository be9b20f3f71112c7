"""A byte-level BPE as Hugging Face publishes one, trained on a play in a second."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[2] / "examples" / "shakespeare.txt"
EOS, BOS = "<|endoftext|>", "<|begin|>"


@cache
def _trained() -> str:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    library.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[EOS, "<pad>", BOS], initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([EXAMPLE.read_text(encoding="utf-8")[:60_000]], trainer)
    library.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return str(library.to_str())


def byte_level() -> dict[str, Any]:
    """Return a tokenizer.json of 501 pieces; 0 is end of text, 1 padding, 2 bos, 500 an added token that is text."""
    made: dict[str, Any] = json.loads(_trained())
    return made


def write_byte_level(folder: Path, *, bos: bool = False, tokenizer: dict[str, Any] | None = None, **settings: Any) -> Path:
    """Write a folder with a tokenizer, ``byte_level()`` by default, and return it.

    Args:
        bos: a text begins with bos, as in Llama 3.
        settings: of tokenizer_config.json, over those of ``byte_level()``.
    """
    made = tokenizer or byte_level()
    if bos:
        special = {BOS: {"id": BOS, "ids": [2], "tokens": [BOS]}}
        single = [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        made["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "pad_token": "<pad>", "bos_token": BOS if bos else None}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | settings), encoding="utf-8")
    return folder
