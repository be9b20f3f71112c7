"""GGUF, the file of llama.cpp, and the proof that llama.cpp computes with it what was trained.

llama.cpp rounds activations to the type of the weights, which hides small faults. So what ``config`` and the renaming make of a model is
compared in float32 and with random weights (as in ``verify``), closely; the file that is kept, as far as its type lets it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minifoundation.config import ModelConfig
from minifoundation.data.fast_tokenizer import FastTokenizer
from minifoundation.data.tokenizer import CHUNK_CHARS, SPACE, SentencePiece, Tokenizer
from minifoundation.errors import UserError
from minifoundation.export.verify import RANDOM_LAYERS, SEED, Check, Parity, random_state
from minifoundation.export.weights import to_hf
from minifoundation.model.rope import raised_theta, rope_frequencies
from minifoundation.model.transformer import Transformer

Kind = Literal["f32", "f16", "q8_0"]

TOLERANCES = {"f32": 1e-3, "f16": 1e-4, "q8_0": 3e-2}
"""In float32: the largest difference of a logit, in standard deviations of the logits. Otherwise: the mean over the places of the
Kullback-Leibler divergence of the next token, in nats; products of 8 bits move single logits far (docs/exports.md)."""
Q8_0_BLOCK = 32
ROW = 256
STEPS = 8
"""Tokens at the end of a row that are given one by one, from the cache of keys and values."""
PRE_TOKENIZERS = {
    ("GPT2",): "gpt-2",
    ("Digits", "GPT2"): "smollm",
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",): "llama-bpe",
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",): "qwen2",
}
"""How a byte-level BPE cuts text before it joins bytes, and llama.cpp's name for that: GPT-2, SmolLM, Llama 3, Qwen 2 and 3."""


def check_installed() -> None:
    """Raise a UserError where the packages that write GGUF and prove it are not installed."""
    try:
        import gguf  # noqa: F401
        import llama_cpp  # noqa: F401
    except ImportError as missing:
        raise UserError("--gguf", f"{missing.name} is not installed", "pip install -e '.[gguf]' (it compiles llama.cpp)") from None


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Raise a UserError for a tokenizer that llama.cpp would read otherwise."""
    match tokenizer:
        case SentencePiece(kind="unigram"):
            problem = "the tokenizer is Unigram, and llama.cpp ignores its byte fallback (ggml-org/llama.cpp#28862): other ids, lost text"
            raise UserError("--gguf", problem, "train with --tokenizer.kind bpe, or leave --gguf out")
        case FastTokenizer():
            if _cuts(tokenizer) not in PRE_TOKENIZERS:
                problem = f"llama.cpp has no name for how the tokenizer ({tokenizer.kind}) cuts text"
                raise UserError("--gguf", problem, "leave --gguf out")


def check_model(config: ModelConfig, kinds: Iterable[Kind]) -> None:
    """Raise a UserError for a model that llama.cpp would compute otherwise, or that a file of one of ``kinds`` cannot hold."""
    if config.qk_norm and config.rope.scaling == "llama3":
        problem = "model.rope.scaling is llama3, which llama.cpp does not compute in models with QK-norm"
        raise UserError("--gguf", problem, "leave --gguf out")
    widths = {
        "model.d_model": config.d_model,
        "model.n_head x head width": config.n_head * config.head_width,
        "model.d_ff": config.d_ff,
    }
    for name, width in widths.items():
        if "q8_0" in kinds and width % Q8_0_BLOCK:
            problem = f"q8_0 keeps numbers in blocks of {Q8_0_BLOCK}, and {name} {width} is not a multiple of that"
            raise UserError("--gguf", problem, "take f16")


def _cuts(tokenizer: FastTokenizer) -> tuple[str, ...]:
    """Return the steps of a pre-tokenizer: regular expressions, GPT2 for that of GPT-2, Digits for digits one by one."""
    found = []
    for part in tokenizer.pre_tokenizers:
        match part["type"]:
            case "Split":
                found.append(part["pattern"].get("Regex", "?"))
            case "Digits":
                found.append("Digits" if part["individual_digits"] else "?")
            case "ByteLevel":
                found += ["GPT2"] if part["use_regex"] else []
            case other:
                found.append(other)
    return tuple(found)


def write_gguf(config: ModelConfig, state: Mapping[str, Tensor], tokenizer: Tokenizer, path: Path, kind: Kind) -> None:
    """Write the weights, the settings and the tokenizer; norms are float32, matrices of ``kind``."""
    import gguf

    architecture = "qwen3" if config.qk_norm else "llama"
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    _add_rope(writer, config)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    type_of = gguf.GGMLQuantizationType[kind.upper()]
    for name, tensor in _tensors(config, state).items():
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quantize(tensor, type_of), raw_dtype=type_of)
    if config.rope.scaling == "llama3":  # llama.cpp has no name for it, and divides the plain frequencies by these
        plain, scaled = (
            rope_frequencies(rope, config.head_width, config.original_seq_len)[0]
            for rope in (config.rope.model_copy(update={"scaling": "none"}), config.rope)
        )
        writer.add_tensor("rope_freqs.weight", (plain / scaled).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_rope(writer: Any, config: ModelConfig) -> None:
    import gguf

    rope = config.rope
    writer.add_rope_dimension_count(config.head_width)
    raised = rope.scaling in ("ntk", "theta")
    writer.add_rope_freq_base(raised_theta(rope, config.head_width, config.original_seq_len) if raised else rope.theta)
    match rope.scaling:
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope.factor)
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope.factor)
            writer.add_rope_scaling_orig_ctx_len(config.original_seq_len)
            writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
            writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, rows: int) -> None:
    """Add the vocabulary; rows beyond it are named and never chosen."""
    from gguf import TokenType

    unused = range(tokenizer.vocab_size, rows)
    special = set(tokenizer.special) - {tokenizer.special.unk}
    match tokenizer:
        case SentencePiece():
            writer.add_tokenizer_model("llama")
            writer.add_tokenizer_pre("default")
            pieces = [(piece.replace(" ", SPACE), score, kind) for piece, score, kind in _sentencepiece(tokenizer)]
            writer.add_add_space_prefix(False)
            writer.add_remove_extra_whitespaces(False)
        case FastTokenizer():
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre(PRE_TOKENIZERS[_cuts(tokenizer)])
            pieces = [(piece, 0.0, kind) for piece, kind in _byte_level(tokenizer)]
            writer.add_token_merges(tokenizer.merges)
        case _:
            raise AssertionError(tokenizer)
    pieces += [(f"[unused {number}]", -1e9, TokenType.UNUSED) for number in unused]
    writer.add_token_list([piece for piece, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([TokenType.CONTROL if number in special else kind for number, (_, _, kind) in enumerate(pieces)])
    writer.add_add_bos_token(bool(tokenizer.prefix))
    writer.add_add_eos_token(False)
    add = writer.add_pad_token_id, writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id
    for add_id, token in zip(add, tokenizer.special, strict=True):
        if token is not None:
            add_id(token)


def _sentencepiece(tokenizer: SentencePiece) -> Iterator[tuple[str, float, Any]]:
    from gguf import TokenType

    for number, (piece, score, ordinary) in enumerate(tokenizer.pieces):
        is_byte = not ordinary and number not in tokenizer.special
        yield piece, score, TokenType.NORMAL if ordinary else TokenType.BYTE if is_byte else TokenType.UNKNOWN


def _byte_level(tokenizer: FastTokenizer) -> Iterator[tuple[str, Any]]:
    from gguf import TokenType

    for number in range(tokenizer.vocab_size):
        added = tokenizer.added.get(number)
        kind = TokenType.NORMAL if added is None else TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        yield tokenizer.piece(number), kind


def _tensors(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, npt.NDArray[np.float32]]:
    """Return the weights by llama.cpp's names, float32.

    For the architecture ``llama`` it rotates neighbouring channels, as Meta's code does, and not the halves of a head: queries and keys
    are put in that order.
    """
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3 if config.qk_norm else gguf.MODEL_ARCH.LLAMA, config.n_layer)
    found = {}
    for name, value in to_hf(config, state).items():
        tensor = value.detach().float().cpu()
        if not config.qk_norm and ("q_proj" in name or "k_proj" in name):
            tensor = tensor.unflatten(0, (-1, 2, config.head_width // 2)).transpose(1, 2).flatten(0, 2)
        theirs = names.get_name(name, try_suffixes=(".weight",))
        assert theirs is not None, name
        found[theirs] = tensor.contiguous().numpy()
    return found


def rounded(state: Mapping[str, Tensor], kind: Kind) -> dict[str, Tensor]:
    """Return ``state`` as a file of ``kind`` holds it, float32."""
    import gguf

    match kind:
        case "f32":
            return dict(state)
        case "f16":
            return {name: value.half().float() if value.ndim > 1 else value for name, value in state.items()}
        case "q8_0":
            q8_0 = gguf.GGMLQuantizationType.Q8_0
            return {
                name: torch.from_numpy(gguf.dequantize(gguf.quantize(value.numpy(), q8_0), q8_0)) if value.ndim > 1 else value
                for name, value in state.items()
            }


def compared(
    config: ModelConfig, state: Mapping[str, Tensor], tokenizer: Tokenizer, files: Mapping[Kind, Path], texts: Sequence[str]
) -> Parity:
    """Return the comparison of llama.cpp with our model and tokenizer: random weights in float32, and the weights in ``files``."""
    shallow = config.model_copy(update={"n_layer": min(config.n_layer, RANDOM_LAYERS)})
    random = random_state(Transformer(shallow).state_dict())
    with TemporaryDirectory() as name:
        probe = Path(name) / "random.gguf"
        write_gguf(shallow, random, tokenizer, probe, "f32")
        checks = _logits("random", shallow, random, probe, "f32")
        faults = _ids(tokenizer, probe, texts)
    for kind, path in files.items():
        checks += _logits("exported", config, rounded(state, kind), path, kind)
    return Parity(tuple(checks), tuple(faults))


def readable(text: str) -> bool:
    """Return whether llama.cpp cuts a text as the tokenizers trained here do.

    It reads a literal U+2581 as a space, and does not cut a word or a run of spaces after ``CHUNK_CHARS`` characters.
    """
    return SPACE not in text and re.search(rf"[^ ]{{{CHUNK_CHARS}}}| {{{CHUNK_CHARS}}}", text) is None


def _ids(tokenizer: Tokenizer, path: Path, texts: Sequence[str]) -> list[str]:
    model = _opened(path, 8)
    faults = []
    for number, text in enumerate(texts):
        if isinstance(tokenizer, SentencePiece) and not readable(text):
            continue
        normal = tokenizer.normalized(text)
        ours, theirs = [*tokenizer.prefix, *tokenizer.encode(text)], model.tokenize(normal.encode(), add_bos=True, special=False)
        if ours != theirs:
            place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
            faults.append(f"text {number}: from token {place} on, llama.cpp has {theirs[place : place + 8]}, not {ours[place : place + 8]}")
    model.close()
    return faults


@torch.no_grad()
def _logits(name: str, config: ModelConfig, state: Mapping[str, Tensor], path: Path, kind: Kind) -> list[Check]:
    """Compare what follows a row of random tokens, of which the last come one by one."""
    native = Transformer(config)
    native.load_state_dict(dict(state))
    length = min(ROW, config.max_seq_len)
    row = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(SEED))
    ours = native.eval().logits(row)[0]
    model = _opened(path, length)
    ids = row[0].tolist()
    model.eval(ids[:-STEPS])
    for token in ids[-STEPS:]:
        model.eval([token])
    theirs = torch.from_numpy(np.array(model.scores[:length]))
    model.close()
    if kind == "f32":
        what, apart = "logits", (ours - theirs).abs().amax(-1) / ours.std()
        at_once, one_by_one = apart[:-STEPS].max(), apart[-STEPS:].max()
    else:
        p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
        what, apart = "mean divergence", (p.exp() * (p - q)).sum(-1)
        at_once, one_by_one = apart[:-STEPS].mean(), apart[-STEPS:].mean()
    return [
        Check(name, f"llama.cpp, {kind}, {what}, row", length - STEPS, at_once.item(), TOLERANCES[kind]),
        Check(name, f"llama.cpp, {kind}, {what}, token by token", STEPS, one_by_one.item(), TOLERANCES[kind]),
    ]


def _opened(path: Path, length: int) -> Any:
    """Return a file of GGUF in llama.cpp, with a cache in float32."""
    import llama_cpp

    f32 = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(str(path), n_ctx=length, n_batch=length, logits_all=True, verbose=False, type_k=f32, type_v=f32)
