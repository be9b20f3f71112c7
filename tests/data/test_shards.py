import hashlib
from pathlib import Path

import numpy as np
import pytest

from minifoundation.data.shards import MANIFEST, Manifest, Pair, Place, Shards, ShardWriter, intact, read_manifest, write_manifest
from minifoundation.errors import UserError


def written(folder: Path, dtype: str = "uint16") -> Manifest:
    """Write one pair by hand: a train shard of two documents and a held-out shard of one."""
    train = ShardWriter(folder / "train-00000.bin", dtype)
    train.add(np.array([1, 500, 65_535, 2], dtype=np.int32), 9)
    train.add(np.array([1, 7, 2], dtype=np.int64), 3)
    held_out = ShardWriter(folder / "held_out-00000.bin", dtype)
    held_out.add(np.array([1, 8, 8, 2]), 6)
    pair = Pair(start=Place(), train=train.finish(), held_out=held_out.finish())
    manifest = Manifest(dtype="uint16" if dtype == "uint16" else "uint32", tokenizer_sha256="t", source={}, settings={}, pairs=(pair,))
    write_manifest(folder, manifest)
    return manifest


@pytest.mark.parametrize(("dtype", "size"), [("uint16", 2), ("uint32", 4)])
def test_what_was_written_is_read_back(tmp_path: Path, dtype: str, size: int) -> None:
    manifest = written(tmp_path, dtype)
    shards = Shards.open(tmp_path)
    assert shards.manifest == manifest == read_manifest(tmp_path)
    (train,), (held_out,) = shards.train, shards.held_out
    assert train.tokens().tolist() == [1, 500, 65_535, 2, 1, 7, 2]
    assert held_out.tokens().tolist() == [1, 8, 8, 2]
    raw = b"".join(value.to_bytes(size, "little") for value in [1, 500, 65_535, 2, 1, 7, 2])
    assert train.path.read_bytes() == raw
    record = manifest.pairs[0].train
    assert record is not None
    assert record.sha256 == hashlib.sha256(raw).hexdigest()
    assert (train.n_tokens, train.documents, train.text_bytes) == (7, 2, 12)
    assert (shards.train_tokens, shards.held_out_tokens, shards.bytes_per_token) == (7, 4, 6 / 4)


def test_a_shard_without_tokens_leaves_no_file(tmp_path: Path) -> None:
    assert ShardWriter(tmp_path / "train-00000.bin", "uint16").finish() is None
    assert list(tmp_path.iterdir()) == []


def test_nothing_stands_under_its_name_before_it_is_finished(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "train-00000.bin", "uint16")
    writer.add(np.arange(100_000) % 60_000, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000.bin.part"]
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_shard_that_is_missing_or_cut_is_named(tmp_path: Path) -> None:
    written(tmp_path)
    path = tmp_path / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=rf"{path}: has 12 bytes instead of 14; make it again: minifoundation prepare --rebuild"):
        Shards.open(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=f"{path}: is missing"):
        Shards.open(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"format": 3}', b'{"format": 2}', b"\xff\xfe"])
def test_a_damaged_manifest_is_one_line(tmp_path: Path, damage: bytes) -> None:
    written(tmp_path)
    (tmp_path / MANIFEST).write_bytes(damage)
    with pytest.raises(UserError, match="is not a manifest of token shards; remove"):
        Shards.open(tmp_path)


def test_a_manifest_of_the_first_format_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / MANIFEST).write_text('{\n "format": 1,\n "dtype": "uint16",\n "pairs": []}')
    with pytest.raises(UserError, match=r"was written by an older version \(format 1\); remove .* and prepare again, or give another"):
        Shards.open(tmp_path)


def test_documents_added_together_are_as_if_added_alone(tmp_path: Path) -> None:
    alone, together = ShardWriter(tmp_path / "alone.bin", "uint16"), ShardWriter(tmp_path / "together.bin", "uint16")
    for ids in ([1, 7, 2], [1, 2], [1, 9, 9, 2]):
        alone.add(ids, 5)
    together.add(np.array([1, 7, 2, 1, 2, 1, 9, 9, 2], np.uint16), 15, documents=3)
    first, second = alone.finish(), together.finish()
    assert first is not None and second is not None
    assert first.model_copy(update={"file": ""}) == second.model_copy(update={"file": ""})
    assert (tmp_path / "alone.bin").read_bytes() == (tmp_path / "together.bin").read_bytes()


def test_a_file_is_intact_only_as_it_was_written(tmp_path: Path) -> None:
    (pair,) = written(tmp_path).pairs
    assert [intact(tmp_path, record) for record in pair.records] == [True, True]
    path = tmp_path / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"\x03")
    (tmp_path / "held_out-00000.bin").unlink()
    assert [intact(tmp_path, record) for record in pair.records] == [False, False]


def test_a_folder_without_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no token shards .*; make them with minifoundation prepare"):
        Shards.open(tmp_path)


@pytest.mark.parametrize("name", ["../train-00000.bin", "/etc/passwd", "a/b.bin", ".hidden", ""])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    written(tmp_path)
    path = tmp_path / MANIFEST
    path.write_text(path.read_text().replace("train-00000.bin", name))
    with pytest.raises(UserError, match="is not a manifest of token shards"):
        Shards.open(tmp_path)
