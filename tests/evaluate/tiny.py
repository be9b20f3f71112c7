"""A random Llama of 30 thousand parameters with a byte-pair tokenizer, in Hugging Face form."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minifoundation.evaluate.model import Model

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "examples" / "benchmarks"
WHOLE = Path(os.environ.get("BENCHMARK_MIRROR") or ROOT.parent / "shared" / "benchmarks")
"""A mirror folder of complete benchmarks (eval-data pull); tests that read it are skipped where there is none."""


def write_tiny_model(folder: Path, *, context: int = 1024, width: int = 32) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train([str(BUNDLED / "allenai/ai2_arc/ARC-Easy/test.jsonl")], trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_items(folder: Path, split: str, items: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


def loaded(folder: Path, *, rows: int | None = None) -> Model:
    """Return the model in ``folder`` as ``eval`` loads it on a CPU."""
    from minifoundation.evaluate.harness import quieten
    from minifoundation.evaluate.model import Model, from_folder

    quieten()
    return Model(from_folder(str(folder), dtype="auto", device="cpu"), rows=rows)
