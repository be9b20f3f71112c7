"""A tokenizer of Hugging Face's is the same one here: ids against AutoTokenizer, bytes against the text; the rest is refused by name."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minifoundation.config import DataConfig
from minifoundation.data import survey
from minifoundation.data.batch import Batch
from minifoundation.data.fast_tokenizer import FastTokenizer
from minifoundation.data.prepare import prepare_shards
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.errors import UserError
from minifoundation.export.tokenizer import tokenizer_differences, write_tokenizer
from tests.data.byte_level import EOS, EXAMPLE, byte_level, write_byte_level

NASTY = [
    "",
    " ",
    f"a literal {EOS}, <pad> and <tool>",
    "\0\x01\x7f\r\n\t  \u2581 \u200d\ufeff",
    "Zażółć e\u0301 日本語 👩\u200d👩\u200d👧",
    "123 4567 1e-5",
    "a" * 5000,
    " " * 3000,
]


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_byte_level(tmp_path_factory.mktemp("tokenizer"), bos=request.param)


def test_ids_are_those_of_transformers_before_and_after_the_export(folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    texts = [*NASTY, EXAMPLE.read_text(encoding="utf-8")[-200_000:]]
    assert tokenizer_differences(tokenizer, folder, texts, split_special_tokens=True) == []
    write_tokenizer(tokenizer, tmp_path, max_seq_len=64)
    assert tokenizer_differences(tokenizer, tmp_path, texts) == []
    again = Tokenizer.load(tmp_path)
    assert [again.encode(text) for text in NASTY] == [tokenizer.encode(text) for text in NASTY]
    assert (again.special, again.prefix) == (tokenizer.special, tokenizer.prefix)


@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.text(alphabet="ab <|endoftext|>\n9").map(lambda text: text * 20))
def test_any_text_decodes_to_itself(text: str) -> None:
    tokenizer = made()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.special.eos not in ids
    assert tokenizer.text_bytes(np.array(ids, dtype=np.int64)) == len(text.encode())


def made(cache: dict[str, Tokenizer] = {}) -> Tokenizer:  # noqa: B006
    if not cache:
        import tempfile

        with tempfile.TemporaryDirectory() as name:
            cache["one"] = Tokenizer.load(write_byte_level(Path(name)))
    return cache["one"]


def test_a_document_begins_as_texts_do_and_ends_with_eos(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    begins = [2] if tokenizer.prefix else []
    documents = tokenizer.encode_documents(["To be", "", "or not"])
    assert [ids.tolist() for ids in documents] == [[*begins, *tokenizer.encode(text), 0] for text in ("To be", "", "or not")]


def test_it_is_one_file_that_is_read_again(folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    kept = tmp_path / "tokenizer.model"
    kept.write_bytes(tokenizer.model)
    for path in (kept, folder / "tokenizer.json"):
        again = Tokenizer.load(path)
        assert (again.sha256, again.special, again.kind) == (tokenizer.sha256, tokenizer.special, "byte-level bpe")
        assert again.encode(NASTY[4]) == tokenizer.encode(NASTY[4])


def test_an_export_of_ours_is_read_and_keeps_its_ids(tmp_path: Path) -> None:
    from minifoundation.config import TokenizerConfig
    from minifoundation.data.tokenizer import train_tokenizer

    text = EXAMPLE.read_text(encoding="utf-8")[:60_000]
    for kind in ("unigram", "bpe"):
        config = TokenizerConfig.model_validate({"kind": kind, "vocab_size": 600})
        trained = train_tokenizer([text], config, tmp_path / kind / "tokenizer.model")
        write_tokenizer(trained, tmp_path / kind / "hf", max_seq_len=64)
        read = Tokenizer.load(tmp_path / kind / "hf")
        assert (read.special, read.prefix, read.kind) == (trained.special, trained.prefix, kind)
        assert read.surfaces == trained.surfaces
        assert [read.encode(one) for one in (*NASTY, text)] == [trained.encode(one) for one in (*NASTY, text)]


def test_shards_made_with_it_know_where_documents_end(folder: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(EXAMPLE.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    config = DataConfig(source=str(corpus), shards_dir=tmp_path / "shards", max_document_bytes=500, shard_tokens=4096, held_out=0)
    tokenizer = Tokenizer.load(folder)
    shards = prepare_shards(str(corpus), config, tokenizer, tokens=None)
    texts = survey.texts(shards.train, tokenizer, 10**9)
    assert "".join(texts) == corpus.read_text(encoding="utf-8")
    expected = [len(tokenizer.prefix) + len(tokenizer.encode(text)) + 1 for text in texts]
    assert survey.split(shards.train, shards.manifest.eos).lengths.tolist() == expected
    row = np.concatenate([shard.tokens() for shard in shards.train])[None, :].astype(np.int64)
    cu_seqlens = Batch.of_rows(row, mask_documents=True, eos=shards.manifest.eos).cu_seqlens
    assert cu_seqlens is not None and cu_seqlens.diff().tolist() == [*expected[:-1], expected[-1] - 1]


def test_nfc_is_the_one_normal_form_that_is_let_pass(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_byte_level(tmp_path, tokenizer=byte_level() | {"normalizer": {"type": "NFC"}}))
    text = "e\u0301a"
    assert tokenizer.decode(tokenizer.encode(text)) == tokenizer.normalized(text) == unicodedata.normalize("NFC", text) != text
    assert tokenizer_differences(tokenizer, tmp_path, [text, *NASTY], split_special_tokens=True) == []


def test_bytes_without_a_token_are_known_to_be_dropped(tmp_path: Path) -> None:
    """As in SmolLM2, whose vocabulary has no token for some control characters."""
    tokenizer = byte_level()
    vocabulary = tokenizer["model"]["vocab"]
    bell = vocabulary.pop("\u0107")  # byte 7
    vocabulary["spare"] = bell
    read = Tokenizer.load(write_byte_level(tmp_path, tokenizer=tokenizer))
    assert isinstance(read, FastTokenizer) and read.missing == b"\x07"
    assert read.decode(read.encode("a\x07b")) == read.normalized("a\x07b") == "ab"
    assert tokenizer_differences(read, tmp_path, ["a\x07b"], split_special_tokens=True) == []


def metaspace(tokenizer: dict[str, Any]) -> None:
    tokenizer["decoder"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}


def prefix_space(tokenizer: dict[str, Any]) -> None:
    tokenizer["pre_tokenizer"]["pretokenizers"][1]["add_prefix_space"] = True


def lowercase(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"] = {"type": "Lowercase"}


def ordinary_eos(tokenizer: dict[str, Any]) -> None:
    tokenizer["added_tokens"][0]["special"] = False


def stripping(tokenizer: dict[str, Any]) -> None:
    tokenizer["added_tokens"][-1]["lstrip"] = True


def no_z(tokenizer: dict[str, Any]) -> None:
    model = tokenizer["model"]
    model["vocab"]["spare"] = model["vocab"].pop("z")
    model["merges"] = [pair for pair in model["merges"] if "z" not in "".join(pair)]


def no_byte(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["extra piece"] = vocabulary.pop(max(vocabulary, key=vocabulary.get))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]


def eos_for_bytes(tokenizer: dict[str, Any]) -> None:
    model = tokenizer["model"]
    model["vocab"]["spare"] = model["vocab"].pop("\u0107")  # byte 7
    model["unk_token"] = EOS


def gap(tokenizer: dict[str, Any]) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 900


def eos_before(tokenizer: dict[str, Any]) -> None:
    special = {EOS: {"id": EOS, "ids": [0], "tokens": [EOS]}}
    single = [{"SpecialToken": {"id": EOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}


def eos_after(tokenizer: dict[str, Any]) -> None:
    special = {"<pad>": {"id": "<pad>", "ids": [1], "tokens": ["<pad>"]}}
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<pad>", "type_id": 0}}]
    tokenizer["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}


def word_piece(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"] = {"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100} | {
        "vocab": tokenizer["model"]["vocab"]
    }


def no_spaces(tokenizer: dict[str, Any]) -> None:
    tokenizer["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "WhitespaceSplit"})


def no_commas(tokenizer: dict[str, Any]) -> None:
    removed = {"type": "Split", "pattern": {"String": ","}, "behavior": "Removed", "invert": False}
    tokenizer["pre_tokenizer"]["pretokenizers"].insert(0, removed)


def spelled_eos(tokenizer: dict[str, Any]) -> None:
    tokenizer["pre_tokenizer"]["pretokenizers"][1]["use_regex"] = False  # so that nothing cuts it
    tokenizer["model"]["ignore_merges"] = True


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (no_spaces, "text that is encoded and decoded is not what it was"),
        (no_commas, "text that is encoded and decoded is not what it was"),
        (spelled_eos, r"a text that spells its token '<\|endoftext\|>' becomes that token"),
        (lambda tokenizer: tokenizer["model"].update(dropout=0.1), r"it leaves out merges at random \(dropout\)"),
        (lambda tokenizer: tokenizer.pop("decoder"), "it is a BPE with the decoder none; give a byte-level BPE"),
        (lambda tokenizer: tokenizer.pop("added_tokens"), r"its eos_token '<\|endoftext\|>' is not marked special"),
        (metaspace, "it is a BPE with the decoder Metaspace; give a byte-level BPE"),
        (prefix_space, "it puts a space before every text"),
        (lowercase, "its normaliser is Lowercase, which loses text"),
        (ordinary_eos, r"its eos_token '<\|endoftext\|>' is not marked special"),
        (stripping, "its token '<tool>' swallows the spaces beside it"),
        (no_z, "it has no tokens for z"),
        (no_byte, "it has a piece with ' ', which stands for no byte"),
        (eos_for_bytes, "bytes that it has no tokens for become its eos_token"),
        (gap, "its ids have gaps"),
        (eos_before, "its bos_token is its eos_token"),
        (eos_after, r"it puts the ids \[1\] around a text"),
        (word_piece, "its model is WordPiece, not BPE"),
        (lambda tokenizer: tokenizer.pop("model"), "no tokenizer.json of Hugging Face's tokenizers"),
        (lambda tokenizer: tokenizer["model"].update(type="Words"), "is not read by tokenizers"),
        (lambda tokenizer: tokenizer["model"].update(continuing_subword_prefix="##"), "is not read by tokenizers"),  # it panics
    ],
)
def test_what_would_lose_text_or_ids_is_refused(fault: Callable[[dict[str, Any]], None], message: str, tmp_path: Path) -> None:
    tokenizer = byte_level()
    fault(tokenizer)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(write_byte_level(tmp_path, tokenizer=tokenizer, bos_token=EOS if fault is eos_before else None))


def test_an_old_file_is_read_as_a_new_one(tmp_path: Path) -> None:
    """GPT-2's on the Hub does not say that its model is a BPE, and has its pairs as strings."""
    old = byte_level()
    del old["model"]["type"]
    old["model"]["merges"] = [" ".join(pair) for pair in old["model"]["merges"]]
    read, new = (Tokenizer.load(write_byte_level(tmp_path / name, tokenizer=made)) for name, made in (("old", old), ("new", byte_level())))
    assert isinstance(read, FastTokenizer) and isinstance(new, FastTokenizer)
    assert (read.kind, read.special, read.merges, read.surfaces) == (new.kind, new.special, new.merges, new.surfaces)
    assert [read.encode(text) for text in NASTY] == [new.encode(text) for text in NASTY]


@pytest.mark.parametrize("spelling", [5, ["a"], {"x": 1}, {"content": 5}, True])
def test_a_special_token_that_is_no_text_is_one_line(spelling: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer_config.json: eos_token is .*, which spells no token; copy the folder again"):
        Tokenizer.load(write_byte_level(tmp_path, eos_token=spelling))


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer.json: no such file; give a folder with a tokenizer.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="names no eos_token"):
        Tokenizer.load(write_byte_level(tmp_path, eos_token=None))
    with pytest.raises(UserError, match="its pad_token '<missing>' is not in its vocabulary"):
        Tokenizer.load(write_byte_level(tmp_path, pad_token="<missing>"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json: cannot be read"):
        Tokenizer.load(tmp_path)
