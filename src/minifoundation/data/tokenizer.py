"""Text to token ids and back without loss: SentencePiece Unigram (arXiv:1804.10959) or BPE (arXiv:1508.07909) with byte fallback.

One in Hugging Face's form, such as a byte-level BPE, is read by ``fast_tokenizer.py``.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from copy import copy
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from minifoundation.config import TokenizerConfig
from minifoundation.errors import UserError

PAD, BOS, EOS, UNK = 0, 1, 2, 3

SPACE = "\u2581"
"""What a SentencePiece file writes for a space."""

CHUNK_CHARS = 1023
CHUNK = rf"[\s\S]{{0,{CHUNK_CHARS - 1}}}[^ ](?![^ ])|[\s\S]{{1,{CHUNK_CHARS}}}"
"""The regular expression of ``chunks``, in words that Python and Oniguruma read alike."""

_CHUNK = re.compile(CHUNK.replace(r"[\s\S]", "."), re.DOTALL)  # the dot is four times as fast as [\s\S]

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # ModelProto.SentencePiece.Type
_UNIGRAM, _BPE = 1, 2  # TrainerSpec.ModelType
_CHARACTERS = (SPACE, *map(chr, range(33, 127)))  # space and visible ASCII: always pieces

# Expected counts are summed in float32 thread by thread, so another number of threads trains another vocabulary.
_TRAINING_THREADS = 16


def chunks(text: str) -> list[str]:
    """Return ``text`` cut into the pieces of at most ``CHUNK_CHARS`` characters that are segmented each by itself.

    Cuts lie before a run of spaces, where no piece of ours crosses, or inside a longer word. Both the native and the
    exported tokenizer cut here, which bounds the sums of scores (see ``Tokenizer``) and the cost of endless words.
    """
    return _CHUNK.findall(text)


class Special(NamedTuple):
    """Ids of the special tokens; None where a tokenizer has none of that kind."""

    pad: int | None
    bos: int | None
    eos: int
    unk: int | None


SPECIAL = Special(PAD, BOS, EOS, UNK)
"""Of the tokenizers that are trained here."""


class Tokenizer(ABC):
    """Text to ids and back: ``decode(encode(text)) == normalized(text)``, and the same ids as its Hugging Face form gives.

    Attributes:
        path: of its file.
        model: the bytes of the file, which checkpoints carry.
        sha256: of ``model``.
        kind: what it is, in a word.
        vocab_size: pieces, special and byte pieces included.
        special: ids of the special tokens.
        prefix: what a document begins with: bos, or nothing. Each ends with eos, which no text encodes to.
    """

    path: Path
    kind: str
    vocab_size: int
    special: Special
    prefix: tuple[int, ...]

    def __init__(self, path: Path, model: bytes) -> None:
        self.path = path
        self.model = model
        self.sha256 = hashlib.sha256(model).hexdigest()

    @staticmethod
    def load(path: Path) -> Tokenizer:
        """Return the tokenizer in a SentencePiece file, or in a ``tokenizer.json`` of Hugging Face (its folder will do).

        The last one is kept: a start reads the same from several places, and making one of many pieces takes half a second.

        Raises:
            UserError: no such file, no tokenizer, or one that is not lossless, has other special ids than ours (SentencePiece), or is of
                a kind that cannot be exported id for id.
        """
        from minifoundation.data.fast_tokenizer import FastTokenizer, is_folder_or_json, is_packed, packed

        model = packed(path) if is_folder_or_json(path) else _read(path)
        if model not in _last:
            made = FastTokenizer(path, model) if is_packed(model) else SentencePiece(path, model)
            _last.clear()
            _last[model] = made
        found = copy(_last[model])
        found.path = path
        return found

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text``, without bos and eos; special tokens spelled in the text are text."""

    @abstractmethod
    def encode_documents(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """Return ``prefix text eos`` for each text; other threads of this process run meanwhile."""

    @property
    @abstractmethod
    def surfaces(self) -> list[bytes]:
        """The bytes of text that each id stands for; special tokens have none."""

    @property
    @abstractmethod
    def special_tokens(self) -> dict[str, str]:
        """The spelling of the special tokens there are, as ``pad_token``, ``bos_token``, ``eos_token`` and ``unk_token``."""

    def normalized(self, text: str) -> str:
        """Return what ``decode`` gives back of ``text``."""
        return text

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; special tokens and ids beyond the vocabulary are empty, broken UTF-8 becomes U+FFFD."""
        known = self.surfaces
        return b"".join([known[token] for token in ids if token < len(known)]).decode("utf-8", "replace")

    def text_bytes(self, ids: npt.NDArray[np.integer[Any]]) -> int:
        """Return how many UTF-8 bytes of text ``ids`` stand for; special tokens have none."""
        lengths = np.array([len(piece) for piece in self.surfaces], np.int64)
        return int(lengths[ids].sum())


_last: dict[bytes, Tokenizer] = {}
"""The tokenizer that was loaded last, by its ``model``."""


class SentencePiece(Tokenizer):
    """A SentencePiece model made exact: ``decode(encode(text)) == text`` and the same ids as its Hugging Face export.

    Two things are changed in memory, not in the file. Spaces stand for themselves instead of U+2581, so that a literal
    U+2581 in a text is told from a space. Unigram scores are rounded to the finest power of two at which the sum over a
    chunk is exact in SentencePiece's float32 and in the export's float64, so that near-ties cannot be decided differently.
    """

    special = SPECIAL
    prefix = (BOS,)

    def __init__(self, path: Path, model: bytes) -> None:
        import sentencepiece

        super().__init__(path, model)
        proto = _parsed(path, model)
        reasons = _faults(proto)
        if reasons:
            why = ", ".join(reasons)
            raise UserError(str(path), f"not a tokenizer for this program: {why}", "train one here: leave tokenizer.path unset")
        self.kind: Literal["unigram", "bpe"] = "bpe" if proto.trainer_spec.model_type == _BPE else "unigram"
        self.vocab_size = len(proto.pieces)
        if self.kind == "unigram":
            _round_scores(proto)
        for piece in proto.pieces:
            piece.piece = piece.piece.replace(SPACE, " ")
        proto.normalizer_spec.escape_whitespaces = False
        self._proto = proto
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    @cached_property
    def pieces(self) -> tuple[tuple[str, float, bool], ...]:
        """(Text with raw spaces, score, is it an ordinary piece) by id."""
        return tuple((p.piece, p.score, p.type == _NORMAL) for p in self._proto.pieces)

    @cached_property
    def surfaces(self) -> list[bytes]:
        return [_surface(p) for p in self._proto.pieces]

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        return {f"{name}_token": self.pieces[token][0] for name, token in self.special._asdict().items()}

    def encode(self, text: str) -> list[int]:
        encoded: list[list[int]] = self._processor.encode(chunks(text), num_threads=1)
        return [token for part in encoded for token in part]

    def encode_documents(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        parts: list[str] = []
        ends = []
        for text in texts:
            parts += chunks(text)
            ends.append(len(parts))
        encoded = self._processor.encode(parts, out_type="numpy", num_threads=1)
        bos, eos = np.array([BOS], np.int32), np.array([EOS], np.int32)
        return [np.concatenate((bos, *encoded[start:end], eos)) for start, end in zip([0, *ends], ends, strict=False)]


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig, out: Path) -> SentencePiece:
    """Return a tokenizer trained on the first ``config.sample_bytes`` of ``texts`` and written to ``out``, whole or not at all.

    The same text gives the same file. Digits are pieces of their own [LLaMA, arXiv:2302.13971], character coverage is
    0.9995 [SentencePiece's default], the rest are bytes. A line on stderr says beforehand what memory and time to
    expect, another when the text supports fewer pieces than asked for.

    Raises:
        UserError: no text, or more distinct characters than ``config.vocab_size`` has room for.
    """
    import sentencepiece

    sample, sample_bytes = _sample(texts, config.sample_bytes)
    if not sample:
        raise UserError("tokenizer", "the corpus has no text to train on", "give a corpus with text, or --tokenizer PATH")
    memory, seconds = training_cost(config.kind, sample_bytes)
    _say(
        f"training {config.vocab_size:,} {config.kind} pieces on {sample_bytes / 1e6:.1f} MB of text: "
        f"about {memory / 1e9:.1f} GB of memory and {_duration(seconds)} of processor time"
    )
    model = _Model()
    train = partial(
        sentencepiece.SentencePieceTrainer.train,
        sentence_iterator=_emptied(sample),
        model_writer=model,
        model_type=config.kind,
        vocab_size=config.vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        pad_id=PAD,
        bos_id=BOS,
        eos_id=EOS,
        unk_id=UNK,
        num_threads=_TRAINING_THREADS,
        minloglevel=2,
    )
    try:
        _interruptible(train)
    except RuntimeError as error:
        raise UserError(
            "tokenizer.vocab_size",
            f"{config.vocab_size:,} pieces cannot be trained on this text ({str(error).strip().rsplit('] ', 1)[-1]})",
            "set a larger tokenizer.vocab_size, or give --tokenizer PATH",
        ) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    with part.open("wb") as file:
        file.write(_with_characters(model.data, config.vocab_size))
        file.flush()
        os.fsync(file.fileno())
    part.replace(out)
    tokenizer = SentencePiece(out, _read(out))
    if tokenizer.vocab_size < config.vocab_size:
        _say(f"warning: the text supports {tokenizer.vocab_size:,} pieces, fewer than tokenizer.vocab_size {config.vocab_size:,}; going on")
    return tokenizer


def training_cost(kind: Literal["unigram", "bpe"], sample_bytes: int) -> tuple[float, float]:
    """Return (peak bytes of memory, seconds of processor time) of training on ``sample_bytes`` of text.

    Fitted to 5 to 50 MB of English Wikipedia. Time is that of 16,384 Unigram pieces; 59,392 took half to two thirds of it.
    """
    match kind:
        case "unigram":
            return 60e6 + 20 * sample_bytes, 2 + 2.5e-6 * sample_bytes
        case "bpe":
            return 60e6 + 8 * sample_bytes, 1 + 0.25e-6 * sample_bytes


def _interruptible(work: Callable[[], None]) -> None:
    """Do ``work`` of minutes inside a library in a thread of its own: a signal reaches Python's main thread only between its own steps."""
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    threading.Thread(target=run, daemon=True).start()
    done.result()


class _Model:
    """The file that SentencePiece writes the model to; only whole models reach the disk."""

    data = b""

    def write(self, data: bytes) -> None:
        self.data = data


def _sample(texts: Iterable[str], limit: int) -> tuple[deque[str], int]:
    """Return lines of ``texts`` cut like ``chunks`` (under the 4192 bytes above which SentencePiece drops a line) and their bytes.

    The ends of lines are not counted: texts of ``limit`` bytes in total are taken whole, so that every source has its share.
    """
    sample: deque[str] = deque()
    size = 0
    for text in texts:
        for line in text.split("\n"):
            for part in chunks(line):
                size += len(part.encode())
                if size > limit and sample:
                    return sample, size
                sample.append(part)
    return sample, size


def _emptied(sample: deque[str]) -> Iterator[str]:
    """Yield the lines and let go of them: SentencePiece keeps its own copy."""
    while sample:
        yield sample.popleft()


def _with_characters(data: bytes, vocab_size: int) -> bytes:
    """Return the model with a piece for each of ``_CHARACTERS``, at the cost of the last pieces where the vocabulary is full.

    SentencePiece's ``required_chars`` does not do it: it is ignored for a text such as ``abcabc``.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto.FromString(data)
    ordinary = {p.piece: p.score for p in model.pieces if p.type == _NORMAL}
    lowest = min(ordinary.values(), default=0.0)
    for character in _CHARACTERS:
        if character not in ordinary:
            model.pieces.add(piece=character, score=lowest)
    longer = [i for i, p in enumerate(model.pieces) if p.type == _NORMAL and len(p.piece) > 1]
    for i in reversed(longer[len(longer) - max(0, len(model.pieces) - vocab_size) :]):
        del model.pieces[i]
    model.trainer_spec.vocab_size = len(model.pieces)
    return bytes(model.SerializeToString(deterministic=True))


def _duration(seconds: float) -> str:
    return f"{math.ceil(seconds)} s" if seconds < 90 else f"{math.ceil(seconds / 60)} min"


def _say(line: str) -> None:
    print(f"tokenizer: {line}", file=sys.stderr, flush=True)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            str(path), f"cannot be read ({error.strerror})", "give the path of a SentencePiece .model file or a tokenizer.json"
        ) from None


def _parsed(path: Path, data: bytes) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        model.Clear()
    if not model.pieces:
        raise UserError(str(path), "not a SentencePiece model", "give the .model file that SentencePiece wrote")
    return model


def _faults(model: Any) -> list[str]:
    """Return why ``model`` would lose text or cannot be exported id for id, or nothing."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    faults = []
    ids = (trainer.pad_id, trainer.bos_id, trainer.eos_id, trainer.unk_id)
    if ids != (PAD, BOS, EOS, UNK):
        faults.append("its ids are pad={} bos={} eos={} unk={}, not pad={} bos={} eos={} unk={}".format(*ids, PAD, BOS, EOS, UNK))
    if trainer.model_type not in (_UNIGRAM, _BPE):
        faults.append("it is neither Unigram nor BPE")
    if not trainer.byte_fallback:
        faults.append("it has no byte fallback")
    if normalizer.precompiled_charsmap or model.denormalizer_spec.precompiled_charsmap:
        faults.append(f"its normaliser is {normalizer.name or 'of its own'}, not identity")
    if normalizer.add_dummy_prefix:
        faults.append("it puts a space before every text (add_dummy_prefix)")
    if normalizer.remove_extra_whitespaces:
        faults.append("it drops repeated spaces (remove_extra_whitespaces)")
    if not normalizer.escape_whitespaces:
        faults.append("it does not escape spaces (escape_whitespaces)")
    if faults:
        return faults
    expected = {PAD: _CONTROL, BOS: _CONTROL, EOS: _CONTROL, UNK: _UNKNOWN}
    pieces = [(p.piece, p.type) for p in model.pieces]  # each access costs
    other = [piece for i, (piece, kind) in enumerate(pieces) if kind != expected.get(i, kind if kind in (_NORMAL, _BYTE) else _NORMAL)]
    if other:
        faults.append(f"it has pieces of a special kind, such as {other[0]!r} (user-defined, control or unused)")
    ordinary = {piece for piece, kind in pieces if kind == _NORMAL}
    # Without these a text that spells "<0x0A>" or "</s>" could become that very piece in the export.
    missing = "".join(sorted({c for piece, kind in pieces if kind != _NORMAL for c in piece} - ordinary))
    if missing:
        faults.append(f"it has no pieces for the characters {missing}")
    alone = {c for piece in ordinary for c in piece} - ordinary
    if alone:
        faults.append(f"it has longer pieces with {min(alone)!r} but no piece for that character alone")
    return faults


def _round_scores(model: Any) -> None:
    """Round the scores to multiples of a power of two of which float32 (24 bits) holds the sum over any chunk exactly."""
    scores = np.array([p.score for p in model.pieces if p.type == _NORMAL], np.float64)
    unknown = 10.0 - scores.min()  # SentencePiece's penalty of a character without a piece
    step = 2.0 ** math.ceil(math.log2(CHUNK_CHARS * (unknown + 1) / 2**24))
    for piece in model.pieces:
        piece.score = round(piece.score / step) * step


def _surface(piece: Any) -> bytes:
    """Return the bytes of text that ``piece`` stands for."""
    if piece.type == _BYTE:  # spelled <0x0A>
        return bytes([int(piece.piece[1:-1], 16)])
    return str(piece.piece).encode() if piece.type == _NORMAL else b""
