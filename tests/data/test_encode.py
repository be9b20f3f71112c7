import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minifoundation.config import DataConfig
from minifoundation.data import encode
from minifoundation.data.encode import Block, Encoding, is_held_out
from minifoundation.data.pieces import Piece, pieces
from minifoundation.data.rows import documents
from minifoundation.data.shards import Manifest, Place, write_manifest
from minifoundation.data.sources import find_corpus
from minifoundation.data.tokenizer import BOS, EOS, SentencePiece, Tokenizer
from minifoundation.errors import UserError


@pytest.fixture
def piece(data: DataConfig) -> Piece:
    """The whole corpus: 500 documents, 250 KB."""
    assert data.source is not None
    (piece,) = pieces(find_corpus(data.source, data), data)
    return piece


@pytest.fixture
def encoding(data: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> Encoding:
    (tmp_path / ".work").mkdir()
    return Encoding(tmp_path, data, tokenizer.path, tokenizer.sha256, "uint16", threads=1, removals=None, block_bytes=50_000)


def blocks(encoding: Encoding, number: int = 7) -> list[Block]:
    found: list[Block] = []
    while (block := Block.read(encoding.path(number, len(found)))) is not None:
        found.append(block)
    return found


def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of documents each time some are encoded."""
    counts: list[int] = []
    encode_documents = SentencePiece.encode_documents

    def counted(self: SentencePiece, texts: Any) -> Any:
        counts.append(len(texts))
        return encode_documents(self, texts)

    monkeypatch.setattr(SentencePiece, "encode_documents", counted)
    return counts


def test_the_blocks_of_a_piece_hold_its_documents_in_order(encoding: Encoding, piece: Piece, tokenizer: Tokenizer) -> None:
    encoding(7, piece)
    found = blocks(encoding)
    skipped: Counter[str] = Counter()
    texts = list(documents(piece, encoding.config, skipped))
    held = [is_held_out(text.encode(), 0.1) for text in texts]
    expected = [[BOS, *tokenizer.encode(text), EOS] for text in texts]
    assert 4 < len(found) < 8
    assert sum((Counter(block.skipped) for block in found), Counter()) == skipped == {"null": 2, "empty": 1}
    assert [block.last for block in found] == [False] * (len(found) - 1) + [True]
    assert np.concatenate([block.is_held_out for block in found]).tolist() == held
    assert np.concatenate([block.tokens for block in found]).tolist() == [len(ids) for ids in expected]
    assert np.concatenate([block.text_bytes for block in found]).tolist() == [len(text.encode()) for text in texts]
    for side, parts in ((False, [block.train for block in found]), (True, [block.held_out for block in found])):
        assert np.concatenate(parts).tolist() == [token for ids, on in zip(expected, held, strict=True) if on == side for token in ids]
        assert {part.dtype for part in parts} == {np.dtype("<u2")}
    for block in found[:-1]:
        assert block.text_bytes[:-1].sum() < 50_000 <= block.text_bytes.sum()


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_make_the_same_blocks_as_one(encoding: Encoding, piece: Piece, threads: int) -> None:
    encoding(7, piece)
    alone = [encoding.path(7, number).read_bytes() for number in range(len(blocks(encoding)))]
    Encoding(**{**vars(encoding), "threads": threads})(8, piece)
    assert [encoding.path(8, number).read_bytes() for number in range(len(blocks(encoding, 8)))] == alone


def test_a_piece_without_documents_is_one_block_that_counts_its_rows(encoding: Encoding, tmp_path: Path) -> None:
    path = tmp_path / "corpus" / "bad.jsonl"
    path.parent.mkdir()
    path.write_text('{"text": ""}\n{"text": null}\n{"text": " "}\n')
    encoding(0, next(pieces(find_corpus(str(path), encoding.config), encoding.config)))
    (block,) = blocks(encoding, 0)
    assert (len(block.tokens), len(block.train), len(block.held_out), block.last) == (0, 0, 0, True)
    assert block.skipped == {"empty": 2, "null": 1}


def test_blocks_that_are_there_are_not_encoded_again(encoding: Encoding, piece: Piece, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = watched(monkeypatch)
    encoding(7, piece)
    made = [encoding.path(7, number).read_bytes() for number in range(len(counts))]
    sizes = counts.copy()
    counts.clear()
    monkeypatch.setattr(encode, "documents", lambda *_: pytest.fail("the piece is read again"))
    encoding(7, piece)
    assert counts == []
    monkeypatch.undo()

    counts = watched(monkeypatch)
    encoding.path(7, 3).unlink()
    damaged = bytearray(made[1])
    damaged[len(damaged) // 2] ^= 1
    encoding.path(7, 1).write_bytes(damaged)
    encoding(7, piece)
    assert counts == [sizes[1], sizes[3]]
    assert [encoding.path(7, number).read_bytes() for number in range(len(made))] == made


def test_what_lies_before_the_manifests_place_is_not_encoded(encoding: Encoding, piece: Piece, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = watched(monkeypatch)
    encoding(7, piece)
    sizes = counts.copy()
    encoding(8, piece)
    encoding.discard_before(Place(piece=7, block=2))
    assert sorted(path.name for path in encoding.work.iterdir()) == [
        *(f"000007-{number:04d}.npz" for number in range(2, len(sizes))),
        *(f"000008-{number:04d}.npz" for number in range(len(sizes))),
    ]
    encoding.discard_before(Place(piece=9))
    assert list(encoding.work.iterdir()) == []

    manifest = Manifest(dtype="uint16", tokenizer_sha256="", source={}, settings={}, place=Place(piece=7, block=2, document=1))
    write_manifest(encoding.folder, manifest)
    counts.clear()
    encoding(7, piece)
    assert counts == sizes[2:]
    encoding(8, piece)
    assert counts == sizes[2:] + sizes


def test_a_damaged_block_is_never_taken_for_one(encoding: Encoding, piece: Piece) -> None:
    encoding(7, piece)
    path = encoding.path(7, 0)
    whole = path.read_bytes()
    block = Block.read(path)
    assert block is not None
    assert Block.read(path.with_name("none.npz")) is None
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert Block.read(path) is None
    rng = random.Random(5)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        found = Block.read(path)
        # A flipped bit can lie in what means nothing, such as the time of a member.
        assert found is None or all(np.array_equal(getattr(found, name), value) for name, value in vars(block).items())


def test_a_tokenizer_that_was_replaced_is_not_used(encoding: Encoding, piece: Piece, tokenizer: Tokenizer) -> None:
    other = Encoding(**{**vars(encoding), "tokenizer_sha256": "0" * 64})
    with pytest.raises(UserError, match=rf"{tokenizer.path}: was replaced while shards were made with it"):
        other(7, piece)
    assert list(encoding.work.iterdir()) == []


def test_a_piece_that_breaks_off_keeps_the_blocks_before(encoding: Encoding, tmp_path: Path) -> None:
    import zstandard

    line = b'{"text": "' + b"some words in a row " * 50 + b'"}\n'
    packed = zstandard.compress(line * 300)
    path = tmp_path / "corpus" / "a.jsonl.zst"
    path.parent.mkdir()
    path.write_bytes(packed[:-20])
    (piece,) = pieces(find_corpus(str(path), encoding.config), encoding.config)
    with pytest.raises(UserError, match=rf"{path}: cannot be read to its end"):
        encoding(0, piece)
    assert all(not block.last for block in blocks(encoding, 0))


def test_held_out_is_a_share_of_the_documents() -> None:
    texts = [f"document {n}".encode() for n in range(20_000)]
    for share in (0.0, 0.01, 0.5):
        found = [text for text in texts if is_held_out(text, share)]
        assert len(found) == pytest.approx(share * 20_000, rel=0.15)
    smaller = {text for text in texts if is_held_out(text, 0.01)}
    assert smaller < {text for text in texts if is_held_out(text, 0.02)}
