"""The tokenizer in Hugging Face form, and the proof that both give the same ids."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minifoundation.data.fast_tokenizer import FastTokenizer
from minifoundation.data.tokenizer import BOS, CHUNK, UNK, SentencePiece, Tokenizer
from minifoundation.wording import counted


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_seq_len: int) -> None:
    """Write ``tokenizer.json`` and its two configuration files: a plain fast tokenizer that starts a text as documents were started.

    Special tokens spelled in a text stay text, and there is no chat template.

    Args:
        max_seq_len: tokens, for ``model_max_length``.
    """
    match tokenizer:
        case FastTokenizer():
            library = tokenizer.library
        case SentencePiece():
            library = _library(tokenizer)
        case _:
            raise AssertionError(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.special_tokens,
        "add_bos_token": bool(tokenizer.prefix),
        "add_eos_token": False,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", tokenizer.special_tokens)


def tokenizer_differences(tokenizer: Tokenizer, folder: Path, texts: Iterable[str], **settings: Any) -> list[str]:
    """Return in words where ``AutoTokenizer`` on ``folder`` and ``tokenizer`` differ in ids or in the round trip; empty means equal.

    Args:
        settings: for ``AutoTokenizer``, over those in the folder.
    """
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **settings)
    differences = []
    if len(exported) != tokenizer.vocab_size:
        differences.append(f"the vocabulary has {counted(len(exported), 'entry', 'entries')}, not {tokenizer.vocab_size:,}")
    for name, token in tokenizer.special._asdict().items():
        found = getattr(exported, f"{name}_token_id")
        if token is not None and found != token:
            differences.append(f"{name}_token is {found}, not {token}")
    bare = exported.encode("", add_special_tokens=False)
    if bare:
        differences.append(f"an empty text without special tokens has the ids {bare}")
    for number, text in enumerate(texts):
        native = [*tokenizer.prefix, *tokenizer.encode(text)]
        ids = exported.encode(text, verbose=False)
        if ids != native:
            place = next((i for i, (a, b) in enumerate(zip(ids, native, strict=False)) if a != b), min(len(ids), len(native)))
            differences.append(f"text {number}: from token {place} on, ids are {ids[place : place + 8]}, not {native[place : place + 8]}")
        normal = tokenizer.normalized(text)
        if exported.decode(native, skip_special_tokens=True) != normal:
            differences.append(f"text {number}: exported decoding does not give the text back")
        if tokenizer.decode(native) != normal:
            differences.append(f"text {number}: native decoding does not give the text back")
    return differences


def _library(tokenizer: SentencePiece) -> Any:
    """Return a SentencePiece model as an object of ``tokenizers``.

    Pieces hold raw spaces, so no normaliser is needed and a literal U+2581 falls back to its bytes as any unknown
    character. Text is cut by the regular expression of ``chunks``.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors

    library = Tokenizer(_unigram(tokenizer) if tokenizer.kind == "unigram" else _bpe(tokenizer))
    special = tokenizer.special_tokens
    bos = special["bos_token"]
    library.pre_tokenizer = pre_tokenizers.Split(Regex(CHUNK), behavior="isolated")
    library.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    library.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, BOS)])
    library.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special.values()])
    return library


def _unigram(tokenizer: SentencePiece) -> Any:
    """Byte and special pieces sit in the trie of ``tokenizers``; scored far below anything else, no text ever becomes one."""
    from tokenizers.models import Unigram

    never = 100 * min(score for _, score, ordinary in tokenizer.pieces if ordinary) - 1000
    return Unigram([(piece, score if ordinary else never) for piece, score, ordinary in tokenizer.pieces], unk_id=UNK, byte_fallback=True)


def _bpe(tokenizer: SentencePiece) -> Any:
    """SentencePiece joins any two pieces whose union is one, best score first; ``tokenizers`` wants each such pair listed in that order."""
    from tokenizers.models import BPE

    score = {piece: value for piece, value, ordinary in tokenizer.pieces if ordinary}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(score, key=lambda piece: -score[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in score and piece[cut:] in score
    ]
    ids = {piece: token for token, (piece, _, _) in enumerate(tokenizer.pieces)}
    return BPE(ids, merges, unk_token=tokenizer.pieces[UNK][0], fuse_unk=False, byte_fallback=True)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
