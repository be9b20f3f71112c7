"""One file of a corpus, opened wherever it lies: its bytes without the compression, or its Parquet."""

from __future__ import annotations

import errno
import gzip
import io
import lzma
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import IO, Any

from minifoundation.data import remote
from minifoundation.data.sources import File
from minifoundation.errors import UserError

BUFFER_BYTES = 256 * 1024
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def file_bytes(file: File) -> int | None:
    """Return the size of the file, None where it is unknown or the file can only be read from its beginning."""
    return remote.seekable_bytes(file.url) if file.size is None else file.size


def plain(file: File, start: int, stop: int | None) -> io.BufferedReader:
    """Return a buffered stream of an uncompressed file that stands at ``start``; it goes on beyond ``stop``, but slower."""
    if file.remote:
        return remote.opened(file.url, file_bytes(file), start=start, stop=stop)
    stream: io.BufferedReader = io.BufferedReader(io.FileIO(file.url), BUFFER_BYTES)
    stream.seek(start)
    return stream


@contextmanager
def unpacked(file: File) -> Iterator[IO[bytes]]:
    """Return a buffered stream of the file without its compression, which raises where the file breaks off."""
    with plain(file, 0, None) as packed:
        if file.form[1] and not packed.peek(1):
            raise EOFError("it is empty, which no compressed file is")  # gzip and zstd take it for one of no text
        raw: Any
        match file.form[1]:
            case ".gz":
                raw = gzip.open(packed)  # noqa: SIM115
            case ".xz":
                raw = lzma.open(packed)  # noqa: SIM115
            case ".zst":
                import pyarrow as pa

                # The stream reader of zstandard takes a file that breaks off for one that ends.
                raw = pa.CompressedInputStream(pa.PythonFile(packed, "r"), "zstd")
            case _:
                yield packed
                return
        with io.BufferedReader(raw, BUFFER_BYTES) as stream:
            yield stream


@contextmanager
def parquet(file: File) -> Iterator[Any]:
    """Return the file as a ``pyarrow.parquet.ParquetFile`` that reads the columns asked for in blocks."""
    import pyarrow.parquet as pq

    options = {"buffer_size": remote.READ_BYTES, "pre_buffer": False}
    size = file_bytes(file)
    if file.form[1] or size is None:  # Parquet is read from its end
        with tempfile.TemporaryFile() as whole, unpacked(file) as stream:
            shutil.copyfileobj(stream, whole, remote.READ_BYTES)
            yield pq.ParquetFile(whole, **options)
    elif file.remote:
        with remote.RemoteFile(file.url, size) as stream:
            yield pq.ParquetFile(stream, metadata=_footer(file.url, size), **options)
    else:
        with pq.ParquetFile(file.url, **options) as opened:
            yield opened


def unreadable(file: File, error: Exception) -> Exception:
    """Return the error to raise when reading a file failed: one that names it, unless it is the disk here that is full."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return error
    reason = error.strerror if isinstance(error, OSError) and error.strerror else remote.reason(error)
    remedy = "fetch the file again, or remove it from the corpus"
    if "too much memory" in reason:  # of zstd: the file is whole
        remedy = "its window is larger than 128 MiB: unpack it with zstd -d --long=31, and pack it again without --long"
    return UserError(file.url, f"cannot be read to its end ({reason})", remedy)


@lru_cache(maxsize=4)
def _footer(url: str, size: int) -> Any:
    """Return the metadata of a remote Parquet file: pieces of one file follow each other, and each would ask for it again."""
    import pyarrow.parquet as pq

    with remote.RemoteFile(url, size) as stream:
        return pq.read_metadata(stream)
