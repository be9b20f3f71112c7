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


@pytest.mark.parametrize("size", [0, 1, 1000, files.SMALL, files.BLOCK - 1, files.BLOCK + 1])
def test_the_hash_is_that_of_the_file(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    with HashedFile(tmp_path / "x") as out:
        out.write(b"head")
        out.write(content)
    assert (tmp_path / "x").read_bytes() == b"head" + content
    assert out.record == files.Record(size + 4, hashlib.sha256(b"head" + content).hexdigest())
    assert files.record_of(tmp_path / "x") == out.record


def test_any_buffer_is_written_byte_for_byte(tmp_path: Path) -> None:
    numbers = torch.arange(100_000, dtype=torch.float32)
    with HashedFile(tmp_path / "x") as out:
        out.write(memoryview(numbers.numpy()))  # type: ignore[arg-type]
    assert (tmp_path / "x").read_bytes() == numbers.numpy().tobytes()


def test_a_full_device_is_an_error_that_names_the_file() -> None:
    with pytest.raises(OSError, match="No space left") as caught, HashedFile(Path("/dev/full")) as out:
        out.write(bytes(2 * files.SMALL))
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == "/dev/full"


def test_a_small_file_is_replaced_whole_or_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_whole(tmp_path / "new" / "x", b"first")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "new" / "x", b"second")
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "new").iterdir()] == [("x", b"first")]
