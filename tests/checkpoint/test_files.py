"""Files that are hashed while they are written."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch

from minifoundation.checkpoint import files
from minifoundation.checkpoint.files import HashedFile, write_whole


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 640, 10_000])
def test_the_hashes_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Whatever pieces it is written in; by several threads where there are several segments."""
    monkeypatch.setattr(files, "SEGMENT", 64)
    monkeypatch.setattr(files, "BLOCK", 16)
    content = b"head" + os.urandom(size)
    with HashedFile(tmp_path / "x") as out:
        out.write(content[:4])
        out.write(content[4 : 4 + size // 3])
        out.write(content[4 + size // 3 :])
    assert (tmp_path / "x").read_bytes() == content
    digests = tuple(hashlib.sha256(content[first : first + 64]).hexdigest() for first in range(0, len(content), 64))
    assert out.record == files.Record(size + 4, digests) == files.record_of(tmp_path / "x")


def test_a_file_of_one_segment_has_the_hash_that_anybody_computes(tmp_path: Path) -> None:
    write_whole(tmp_path / "x", b"content")
    assert files.record_of(tmp_path / "x").sha256 == (hashlib.sha256(b"content").hexdigest(),)


def test_any_buffer_is_written_byte_for_byte(tmp_path: Path) -> None:
    numbers = torch.arange(100_000, dtype=torch.float32)
    with HashedFile(tmp_path / "x") as out:
        out.write(memoryview(numbers.numpy()))  # type: ignore[arg-type]
    assert (tmp_path / "x").read_bytes() == numbers.numpy().tobytes()


@pytest.mark.parametrize("size", [1000, 1_000_000])
def test_a_full_device_is_an_error_that_names_the_file(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(files, "SEGMENT", 100_000)
    with pytest.raises(OSError, match="No space left") as caught, HashedFile(Path("/dev/full")) as out:
        out.write(bytes(size))
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == "/dev/full"


def test_a_small_file_is_replaced_whole_or_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "new" / "x", b"first")
    assert not (tmp_path / "new").exists(), "a folder that has vanished is not made again"
    (tmp_path / "new").mkdir()
    write_whole(tmp_path / "new" / "x", b"first")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "new" / "x", b"second")
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "new").iterdir()] == [("x", b"first")]
