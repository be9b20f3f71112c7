"""Text in, text out; the vocabulary that training makes; the models that are refused."""

import hashlib
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from minifoundation.config import TokenizerConfig
from minifoundation.data.tokenizer import BOS, CHUNK_CHARS, EOS, PAD, UNK, SentencePiece, Tokenizer, chunks, train_tokenizer
from minifoundation.errors import UserError

EXAMPLE = Path(__file__).parents[2] / "examples" / "shakespeare.txt"
Capture = pytest.CaptureFixture[str]

NASTY = [
    "",
    " ",
    "  two  spaces  ",
    "\u2581",
    "a\u2581b \u2581 \u2581\u2581",
    "<s>a</s><pad><unk> <0x0A><0xE2",
    "</s>",
    "\0a\0",
    "".join(map(chr, range(32))) + "\x7f",
    "\r\n\r\r\n\n",
    "\tdef f(x):\n\t\treturn  12345\n",
    " " * 5000,
    "x " * 3000 + "  ",
    "e\u0301 a\u0308\u0323",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "\u4e2d\u6587\u3000\u65e5\u672c\u8a9e \u0420\u0443\u0441 \u0639\u0631\u0628\u064a",
    "\u2585\u2047\ufeff\ufffd\uffff\U0010ffff",
]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = EXAMPLE.read_text(encoding="utf-8")[:400_000]
    return train_tokenizer([text], TokenizerConfig(kind=request.param, vocab_size=1024), tmp_path_factory.mktemp("spm") / "tokenizer.model")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    return train_tokenizer([EXAMPLE.read_text(encoding="utf-8")[:20_000]], TokenizerConfig(kind="bpe", vocab_size=512), path).path


def survives(tokenizer: Tokenizer, text: str) -> bool:
    ids = tokenizer.encode(text)
    return tokenizer.decode(ids) == text and not {PAD, BOS, EOS, UNK} & set(ids)


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_any_text_decodes_to_itself(tokenizer: Tokenizer, text: str) -> None:
    assert survives(tokenizer, text)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_generated_text_decodes_to_itself(tokenizer: Tokenizer, text: str) -> None:
    assert survives(tokenizer, text)


@pytest.mark.parametrize("text", ["q" * 1_000_000, "\u0378" * 1_000_000, "ab" * 500_000, " " * 1_000_000], ids=lambda text: ascii(text[:2]))
def test_a_megabyte_without_an_end_of_word_takes_seconds(tokenizer: Tokenizer, text: str) -> None:
    start = time.process_time()
    assert survives(tokenizer, text)
    assert time.process_time() - start < 20


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["word", " ", "  ", "\n", "x" * 700, " " * 700, "\u2581"]), max_size=40).map("".join))
def test_chunks_are_the_whole_text_cut_before_spaces(text: str) -> None:
    parts = chunks(text)
    assert "".join(parts) == text
    assert all(0 < len(part) <= CHUNK_CHARS for part in parts)
    for before, after in itertools.pairwise(parts):
        at_word = after[0] == " " and before[-1] != " "
        assert at_word or len(before) == CHUNK_CHARS


def test_segmentation_is_that_of_sentencepiece(tokenizer: Tokenizer) -> None:
    """The oracle is the file, untouched, in plain SentencePiece; scores are rounded, so a Unigram tie may fall the other way."""
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()[-3000:]
    equal = 0
    for line in lines:
        ids, expected = tokenizer.encode(line), plain.encode(line)
        equal += ids == expected
        if tokenizer.kind == "unigram":
            assert sum(map(plain.get_score, ids)) == pytest.approx(sum(map(plain.get_score, expected)), abs=0.02)
    assert equal == len(lines) if tokenizer.kind == "bpe" else equal > 0.99 * len(lines)


def test_documents_stand_between_bos_and_eos(tokenizer: Tokenizer) -> None:
    texts = [*NASTY, EXAMPLE.read_text(encoding="utf-8")[:10_000]]
    documents = tokenizer.encode_documents(texts)
    assert [ids.tolist() for ids in documents] == [[BOS, *tokenizer.encode(text), EOS] for text in texts]
    assert {ids.dtype for ids in documents} == {np.dtype(np.int32)}
    assert tokenizer.encode_documents([]) == []


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    (ids,) = tokenizer.encode_documents([text])
    assert tokenizer.text_bytes(ids) == len(text.encode())


def test_decoding_passes_over_what_is_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([BOS, *tokenizer.encode("a b"), EOS, PAD, UNK, tokenizer.vocab_size, 10**6]) == "a b"
    assert tokenizer.decode(tokenizer.encode("\u00e9")[:1]) in ("\u00e9", "\ufffd")
    assert tokenizer.decode(tokenizer.encode("\u0378")[:1]) == "\ufffd"


def test_digits_and_ascii_are_pieces_and_words_carry_their_space(tokenizer: SentencePiece) -> None:
    pieces = [tokenizer.pieces[token][0] for token in tokenizer.encode(" 1234 the")]
    assert pieces == [" ", "1", "2", "3", "4", " the"]
    ordinary = {piece for piece, _, is_ordinary in tokenizer.pieces if is_ordinary}
    assert ordinary >= {chr(c) for c in range(32, 127)}
    assert not any(" " in piece.lstrip(" ") or (len(piece) > 1 and any(c.isdigit() for c in piece)) for piece in ordinary)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_the_same_text_gives_the_same_file_and_one_line_beforehand(kind: str, tmp_path: Path, capfd: Capture) -> None:
    text = EXAMPLE.read_text(encoding="utf-8")[:100_000]
    config = TokenizerConfig.model_validate({"kind": kind, "vocab_size": 700})
    first = train_tokenizer([text], config, tmp_path / "new" / "first.model")
    told = capfd.readouterr()
    second = train_tokenizer(text.splitlines(), config, tmp_path / "second.model")
    assert first.path.read_bytes() == second.path.read_bytes()
    assert (first.sha256, first.vocab_size, first.kind) == (second.sha256, 700, kind)
    assert told.out == ""
    seconds = 3 if kind == "unigram" else 2
    expected = f"training 700 {kind} pieces on 0.1 MB of text: about 0.1 GB of memory and {seconds} s of processor time"
    assert told.err == f"tokenizer: {expected}\n"


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("text", ["to be or not to be", "abcabc", "a" * 100_000, "a\tb\0c\u2581"])
def test_a_text_that_supports_fewer_pieces_is_a_warning(kind: str, text: str, tmp_path: Path, capfd: Capture) -> None:
    tokenizer = train_tokenizer([text, "more"], TokenizerConfig.model_validate({"kind": kind, "vocab_size": 5000}), tmp_path / "t.model")
    assert 355 <= tokenizer.vocab_size < 500
    warning = capfd.readouterr().err.splitlines()[1]
    assert (
        warning == f"tokenizer: warning: the text supports {tokenizer.vocab_size} pieces, fewer than tokenizer.vocab_size 5,000; going on"
    )
    assert survives(tokenizer, text + "</s><0x0A> 0")


def test_a_full_vocabulary_of_a_text_without_ascii_keeps_its_size(tmp_path: Path) -> None:
    rng = random.Random(0)
    words = ["".join(chr(0x430 + rng.randrange(32)) for _ in range(rng.randint(1, 6))) for _ in range(2000)]
    for kind in ("unigram", "bpe"):
        config = TokenizerConfig.model_validate({"kind": kind, "vocab_size": 512})
        tokenizer = train_tokenizer(["".join(rng.choices(words, k=20_000))], config, tmp_path / f"{kind}.model")
        assert tokenizer.vocab_size == 512
        assert survives(tokenizer, "".join(words) + "</s>")


def test_an_endless_corpus_is_read_up_to_the_sample(tmp_path: Path) -> None:
    read = 0

    def endless() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield "one document of many, each of 500 bytes" * 12 + "and the\nlast of the words in it"

    train_tokenizer(endless(), TokenizerConfig(kind="bpe", vocab_size=512, sample_bytes=50_000), tmp_path / "t.model")
    assert read in (100, 101)


def test_a_long_line_is_cut_not_dropped(tmp_path: Path) -> None:
    line = " ".join(["extraordinary"] * 20_000)
    tokenizer = train_tokenizer([line, "short"], TokenizerConfig(kind="bpe", vocab_size=512), tmp_path / "t.model")
    assert " extraordinary" in {piece for piece, _, _ in tokenizer.pieces}


def broken() -> Iterator[str]:
    yield "some text"
    raise OSError("the network is gone")


@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        (list, UserError, "tokenizer: the corpus has no text to train on; give a corpus with text, or --tokenizer PATH"),
        (lambda: ["", "\n\n"], UserError, "the corpus has no text to train on"),
        (broken, OSError, "the network is gone"),
        (lambda: ["".join(map(chr, range(0x4E00, 0x9000)))], UserError, "tokenizer.vocab_size: 512 pieces cannot be trained on this text"),
    ],
)
def test_training_that_fails_leaves_nothing(texts: Callable[[], Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error) as raised:
        train_tokenizer(texts(), TokenizerConfig(vocab_size=512), tmp_path / "t.model")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def swap_ids(model: Any) -> None:
    model.trainer_spec.pad_id, model.trainer_spec.unk_id = 3, 0


def no_bytes(model: Any) -> None:
    model.trainer_spec.byte_fallback = False


def other_type(model: Any) -> None:
    model.trainer_spec.model_type = 3


def dummy_prefix(model: Any) -> None:
    model.normalizer_spec.add_dummy_prefix = True


def drops_spaces(model: Any) -> None:
    model.normalizer_spec.remove_extra_whitespaces = True


def nfkc(model: Any) -> None:
    model.normalizer_spec.name, model.normalizer_spec.precompiled_charsmap = "nfkc", b"x"


def raw_spaces(model: Any) -> None:
    model.normalizer_spec.escape_whitespaces = False


def user_symbol(model: Any) -> None:
    model.pieces.add(piece="<|user|>", type=4)


def no_zero(model: Any) -> None:
    next(piece for piece in model.pieces if piece.piece == "0").piece = "\u00e9"


def no_single(model: Any) -> None:
    model.pieces.add(piece="\u00e9a", score=-9)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (swap_ids, "its ids are pad=3 bos=1 eos=2 unk=0, not pad=0 bos=1 eos=2 unk=3"),
        (no_bytes, "it has no byte fallback"),
        (other_type, "it is neither Unigram nor BPE"),
        (dummy_prefix, "it puts a space before every text (add_dummy_prefix)"),
        (drops_spaces, "it drops repeated spaces (remove_extra_whitespaces)"),
        (nfkc, "its normaliser is nfkc, not identity"),
        (raw_spaces, "it does not escape spaces (escape_whitespaces)"),
        (user_symbol, "it has pieces of a special kind, such as '<|user|>' (user-defined, control or unused)"),
        (no_zero, "it has no pieces for the characters 0"),
        (no_single, "it has longer pieces with '\u00e9' but no piece for that character alone"),
    ],
)
def test_a_model_that_is_not_ours_is_refused_with_the_reason(
    change: Callable[[Any], None], reason: str, small: Path, tmp_path: Path
) -> None:
    model = ModelProto.FromString(small.read_bytes())
    change(model)
    path = tmp_path / "other.model"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError) as refused:
        Tokenizer.load(path)
    assert str(refused.value) == f"{path}: not a tokenizer for this program: {reason}; train one here: leave tokenizer.path unset"


def test_every_reason_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "stock.model"
    with path.open("wb") as file:
        lines = iter(EXAMPLE.read_text(encoding="utf-8")[:20_000].splitlines())
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=file, vocab_size=300, hard_vocab_limit=False, minloglevel=2
        )
    with pytest.raises(UserError) as refused:
        Tokenizer.load(path)
    for reason in (
        "pad=-1 bos=1 eos=2 unk=0",
        "no byte fallback",
        "nmt_nfkc, not identity",
        "add_dummy_prefix",
        "remove_extra_whitespaces",
    ):
        assert reason in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"not a model", b'{"model": {}}'])
def test_a_file_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "some.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"not a SentencePiece model; give the \.model file that SentencePiece wrote"):
        Tokenizer.load(path)


def test_the_same_file_is_made_into_a_tokenizer_once(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start reads it from where it was given, and from the run's folder, several times."""
    paths = [tmp_path / name for name in ("given.model", "copied.model", "other.model")]
    for path in paths[:2]:
        path.write_bytes(tokenizer.model)
    other = train_tokenizer([EXAMPLE.read_text(encoding="utf-8")[:50_000]], TokenizerConfig(kind="bpe", vocab_size=600), paths[2])
    made: list[Path] = []
    monkeypatch.setattr("minifoundation.data.tokenizer._last", {})
    monkeypatch.setattr(SentencePiece, "__init__", _counted(SentencePiece.__init__, made))
    third, first, second, again = (Tokenizer.load(path) for path in (paths[2], *paths[:2], paths[2]))
    assert made == [paths[2], paths[0], paths[2]] and [first.path, second.path, third.path, again.path] == [*paths, paths[2]]
    assert first.encode("abc") == second.encode("abc") and third.sha256 == again.sha256 == other.sha256 != first.sha256


def _counted(init: Callable[..., None], made: list[Path]) -> Callable[..., None]:
    def counted(self: SentencePiece, path: Path, model: bytes) -> None:
        made.append(path)
        init(self, path, model)

    return counted


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"gone\.model: cannot be read \(No such file or directory\); give the path of a SentencePiece .model file"
    ):
        Tokenizer.load(tmp_path / "gone.model")


@pytest.mark.usefixtures("signals")
def test_a_signal_does_not_wait_for_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes, for the default sample."""
    rounds = 8_000_000  # inside a library, as the real one, and in the end all the same

    def train(**_options: Any) -> None:
        hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)

    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", train)
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train_tokenizer(["some text"], TokenizerConfig(vocab_size=512), tmp_path / "t.model")
    assert time.monotonic() - began < 1.5
    assert not list(tmp_path.iterdir())
