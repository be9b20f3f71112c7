"""Native and exported tokenizer give the same ids, and a fault in the export is seen."""

import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minifoundation.config import TokenizerConfig
from minifoundation.data import tokenizer as native
from minifoundation.data.tokenizer import BOS, CHUNK_CHARS, EOS, SentencePiece, train_tokenizer
from minifoundation.export.tokenizer import tokenizer_differences, write_tokenizer

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "shakespeare.txt"
VALIDATION = ROOT.parent / "shared" / "corpus" / "val.jsonl.xz"
HUMANEVAL = ROOT.parent / "shared" / "benchmarks" / "openai" / "openai_humaneval" / "openai_humaneval" / "test.parquet"

CODE = (
    'def swap(a, b):\n    if a > b:\r\n\t\treturn b, a  # <s>\n    return f"{a!r}</s>"\n\n\n        else:\n            x = [0x1F, 1e-3]\n'
)
NASTY = [
    "",
    " ",
    "a",
    "\n",
    "\u2581",
    "a\u2581b \u2581 \u2581\u2581",
    "<s>a</s><pad><unk> <0x0A><0xE2><0x",
    "</s>",
    " <s> ",
    "\0a\0",
    "".join(map(chr, range(32))) + "\x7f\x85\u2028",
    "\r\n\r\r\n\n",
    " " * 5000,
    "x " * 3000 + "  ",
    "e\u0301 a\u0308\u0323 \ufb01 \u212b",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd",
    "\u4e2d\u6587\u3000\u65e5\u672c\u8a9e \u0420\u0443\u0441 \u0639\u0631\u0628\u064a \u0e44\u0e17\u0e22",
    "\u2585\u2047\ufeff\ufffd\uffff\U0010ffff",
    CODE,
    *("-" * n for n in range(1, 40)),
    *("ab" * n for n in (7, 100, CHUNK_CHARS)),
]
ENDLESS = ["q" * 1_000_000, "\u0378" * 300_000, " " * 300_000]


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SentencePiece:
    text = EXAMPLE.read_text(encoding="utf-8")[:400_000] + CODE * 20 + "-" * 30
    return train_tokenizer([text], TokenizerConfig(kind=request.param, vocab_size=1500), tmp_path_factory.mktemp("spm") / "tokenizer.model")


@pytest.fixture(scope="module")
def folder(tokenizer: SentencePiece, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    write_tokenizer(tokenizer, folder, max_seq_len=2048)
    return folder


@pytest.fixture(scope="module")
def fast(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


def near_ties(tokenizer: SentencePiece, *, count: int) -> list[str]:
    """Texts of many equally good segmentations: random pieces in a row, and short patterns over and over."""
    rng = random.Random(0)
    ordinary = [piece for piece, _, is_ordinary in tokenizer.pieces if is_ordinary]
    texts = []
    for _ in range(count):
        texts.append("".join(rng.choices(ordinary, k=300)))
        texts.append("".join(rng.choices("etaoinshr", k=1000)))
        alphabet = rng.choices(["a", "b", " ", "-", "=", "\u0378", "\n", "e", "t", "1", "<", "s", ">"], k=rng.choice((1, 2, 3)))
        texts.append("".join(rng.choices(alphabet, k=2000)))
        texts.append("".join(rng.choices(alphabet, k=5)) * 300)
    return texts


def validation() -> list[str]:
    if not VALIDATION.exists():
        pytest.skip(f"no {VALIDATION.name}: it lies beside the repository only where it is developed")
    with lzma.open(VALIDATION, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def test_nasty_texts_have_the_same_ids(tokenizer: SentencePiece, folder: Path) -> None:
    assert tokenizer_differences(tokenizer, folder, NASTY) == []


def test_a_megabyte_of_one_letter_has_the_same_ids(tokenizer: SentencePiece, folder: Path) -> None:
    assert tokenizer_differences(tokenizer, folder, ENDLESS) == []


def test_a_play_has_the_same_ids(tokenizer: SentencePiece, folder: Path) -> None:
    assert tokenizer_differences(tokenizer, folder, [EXAMPLE.read_text(encoding="utf-8")[-300_000:]]) == []


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text(alphabet="ab \n\u2581<>s/0x").map(lambda text: text * 50))
def test_generated_texts_have_the_same_ids(tokenizer: SentencePiece, fast: Any, text: str) -> None:
    ids = [BOS, *tokenizer.encode(text)]
    assert fast.encode(text) == ids
    assert fast.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids) == text


def test_near_ties_have_the_same_ids(tokenizer: SentencePiece, folder: Path) -> None:
    assert tokenizer_differences(tokenizer, folder, near_ties(tokenizer, count=100)) == []


def test_without_rounded_scores_unigram_near_ties_fall_differently(
    tokenizer: SentencePiece, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_round_scores", lambda model: None)
    unrounded = SentencePiece(tokenizer.path, tokenizer.model)
    write_tokenizer(unrounded, tmp_path, max_seq_len=2048)
    differences = tokenizer_differences(unrounded, tmp_path, near_ties(unrounded, count=100))
    assert bool(differences) == (tokenizer.kind == "unigram"), "BPE compares ranks, not sums"


def test_some_wikipedia_has_the_same_ids(tokenizer: SentencePiece, folder: Path) -> None:
    assert tokenizer_differences(tokenizer, folder, validation()[:20]) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_all_the_wikipedia_has_the_same_ids_with_a_vocabulary_of_its_own(kind: str, tmp_path: Path) -> None:
    texts = validation()
    config = TokenizerConfig.model_validate({"kind": kind, "vocab_size": 16_384})
    tokenizer = train_tokenizer(texts, config, tmp_path / "tokenizer.model")
    write_tokenizer(tokenizer, tmp_path / "hf", max_seq_len=2048)
    assert tokenizer_differences(tokenizer, tmp_path / "hf", texts) == []
    assert tokenizer_differences(tokenizer, tmp_path / "hf", near_ties(tokenizer, count=1000)) == []


def test_what_transformers_reads(fast: Any, tokenizer: SentencePiece) -> None:
    assert (fast.pad_token_id, fast.bos_token_id, fast.eos_token_id, fast.unk_token_id) == (0, 1, 2, 3)
    assert (fast.model_max_length, fast.padding_side, len(fast)) == (2048, "left", tokenizer.vocab_size)
    batch = fast(["to be", "or not to be"], padding=True)
    assert batch["input_ids"][0][-len(tokenizer.encode("to be")) :] == tokenizer.encode("to be")
    assert batch["attention_mask"][0][0] == 0 and batch["input_ids"][0][0] == 0
    assert "token_type_ids" not in batch
    assert fast.encode("to be", add_special_tokens=False) == tokenizer.encode("to be")
    assert fast.decode([BOS, *tokenizer.encode(" ,  to be"), EOS]) == "<s> ,  to be</s>"


def test_saved_again_by_transformers_it_is_the_same(fast: Any, tokenizer: SentencePiece, tmp_path: Path) -> None:
    fast.save_pretrained(str(tmp_path))
    assert tokenizer_differences(tokenizer, tmp_path, NASTY) == []


def wrong_bos(tokenizer: dict[str, Any]) -> None:
    tokenizer["post_processor"]["special_tokens"]["<s>"]["ids"] = [EOS]


def no_bos(tokenizer: dict[str, Any]) -> None:
    tokenizer["post_processor"] = None


def dummy_prefix(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"] = {"type": "Prepend", "prepend": " "}


def nfkc(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"] = {"type": "NFKC"}


def strips(tokenizer: dict[str, Any]) -> None:
    tokenizer["decoder"]["decoders"].append({"type": "Strip", "content": " ", "start": 1, "stop": 0})


def no_byte_fallback(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["byte_fallback"] = False


def swapped_pieces(tokenizer: dict[str, Any]) -> None:
    vocab = tokenizer["model"]["vocab"]
    if isinstance(vocab, list):
        a, b = (next(i for i, (piece, _) in enumerate(vocab) if piece == letter) for letter in "ab")
        vocab[a], vocab[b] = vocab[b], vocab[a]
    else:
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def specials_in_text(settings: dict[str, Any]) -> None:
    settings["split_special_tokens"] = False


def other_pad(settings: dict[str, Any]) -> None:
    settings["pad_token"] = "</s>"


@pytest.mark.parametrize(
    ("name", "fault", "found"),
    [
        ("tokenizer.json", wrong_bos, "text 0: from token 0 on, ids are [2], not [1]"),
        ("tokenizer.json", no_bos, "text 0: from token 0 on, ids are [], not [1]"),
        ("tokenizer.json", dummy_prefix, "text 2: from token 1 on, ids are"),
        ("tokenizer.json", nfkc, "text 14: from token"),
        ("tokenizer.json", strips, "text 1: exported decoding does not give the text back"),
        ("tokenizer.json", no_byte_fallback, "text 3: from token 1 on, ids are [3], not"),
        ("tokenizer.json", swapped_pieces, "text 2: exported decoding does not give the text back"),
        ("tokenizer_config.json", specials_in_text, "text 7: from token 1 on, ids are [2], not"),
        ("special_tokens_map.json", other_pad, "pad_token is 2, not 0"),
    ],
)
def test_a_planted_fault_is_found(
    name: str, fault: Callable[[dict[str, Any]], None], found: str, tokenizer: SentencePiece, folder: Path, tmp_path: Path
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = json.loads((tmp_path / name).read_text(encoding="utf-8"))
    fault(values)
    (tmp_path / name).write_text(json.dumps(values), encoding="utf-8")
    differences = tokenizer_differences(tokenizer, tmp_path, NASTY)
    assert any(found in difference for difference in differences), differences[:5]


def test_the_export_of_another_tokenizer_is_found(tokenizer: SentencePiece, folder: Path, tmp_path: Path) -> None:
    other = train_tokenizer([CODE * 100], TokenizerConfig(kind="bpe", vocab_size=512), tmp_path / "other.model")
    assert tokenizer_differences(other, folder, [])[0] == f"the vocabulary has {tokenizer.vocab_size:,} entries, not {other.vocab_size:,}"


def test_every_humaneval_solution_survives_separate_encoding(tokenizer: SentencePiece, fast: Any) -> None:
    if not HUMANEVAL.exists():
        pytest.skip("no HumanEval: it lies beside the repository only where it is developed")
    pytest.importorskip("lm_eval")
    import pyarrow.parquet as parquet
    from lm_eval.models.huggingface import HFLM

    class Encoder(HFLM):  # type: ignore[misc]
        """lm-eval's own encoding, without a model."""

        def __init__(self) -> None:
            self.tokenizer, self.add_bos_token, self.backend = fast, None, "causal"

        @property
        def prefix_token_id(self) -> int:
            return BOS

    lm = Encoder()
    rows = parquet.read_table(HUMANEVAL).to_pylist()
    assert len(rows) == 164
    for row in rows:
        prompt, solution = row["prompt"], row["canonical_solution"]
        context, continuation = lm._encode_pair(prompt, solution)
        assert context + continuation == [BOS, *tokenizer.encode(prompt + solution)]
        assert fast.decode(context, skip_special_tokens=True) == prompt.rstrip()
        assert fast.decode(continuation, skip_special_tokens=True) == prompt[len(prompt.rstrip()) :] + solution
        apart = lm.tok_encode(solution, add_special_tokens=False)
        assert lm.tok_decode(apart) == solution
        assert lm.tok_decode(lm.tok_encode(prompt)[1:] + apart) == prompt + solution
