"""Files behind a network: everything that fsspec opens, read in blocks that are asked for again until they are whole or patience ends.

A data set of the Hugging Face Hub is read by range requests over its client's session: the file objects of the client read on
beyond what is asked for, and try again in silence for minutes.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import random
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from http.client import responses
from typing import IO, TYPE_CHECKING, Any, TypeVar

from minifoundation.errors import UserError
from minifoundation.wording import counted

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

READ_BYTES = 8 * 1024 * 1024
"""Asked for at once: long enough that the round trip does not count, short enough to be fetched again."""
BEYOND_BYTES = 256 * 1024
"""Asked for at once beyond the end of a span, for the rest of its last line."""
TIMEOUT_SECONDS = 30.0
"""A connection over HTTP that brings nothing for this long is cut; for content of the Hub it is HF_HUB_DOWNLOAD_TIMEOUT (10)."""
CONTACT_SECONDS = 5.0
"""How long a corpus that was never reached is tried: what is wrong is most likely the name or the network."""
LISTING_SECONDS = 60.0
"""How long the files of a data set that is there are asked for; the Hub's client tries again by itself too."""
PATIENCE_SECONDS = 600.0
"""How long one block is tried: longer than the five minutes over which the Hub counts requests."""
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
QUIET_SECONDS = 5.0
"""Retries are told at most this often."""

LATER = (408, 425, 429)
"""HTTP statuses below 500 that may be right later."""
HOPELESS = (
    UserError,
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    ImportError,
    MemoryError,
    NotImplementedError,
    AttributeError,
    TypeError,
    NameError,
)
"""What asking again does not mend."""

T = TypeVar("T")
_told = -QUIET_SECONDS


def retried(what: str, call: Callable[[], T], *, patience: float | None = None) -> T:
    """Return what ``call`` returns, calling again after exponential back-off with jitter, or the wait that the server asked for.

    Args:
        what: the file or data set, for the line that tells of a retry.
        patience: seconds after which no new try begins; None is PATIENCE_SECONDS, which a server may always ask for.

    Raises:
        Exception: of ``call``, when trying again cannot help or has not helped for too long.
    """
    start = time.monotonic()
    attempt = 0
    while True:
        try:
            return call()
        except Exception as error:
            status, asked = _answer(error)
            wait = max(asked, min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2**attempt) * random.uniform(0.5, 1))
            allowed = PATIENCE_SECONDS if patience is None or asked else patience
            if _is_hopeless(error, status) or time.monotonic() + wait > start + allowed:
                raise
            _tell(f"{what}: {reason(error)}; trying again in {math.ceil(wait)} s")
        time.sleep(wait)
        attempt += 1


def fetched(url: str, call: Callable[[], T]) -> T:
    """Return what ``call`` reads of the file, trying as long as PATIENCE_SECONDS.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return retried(url, call)
    except UserError:
        raise
    except Exception as error:
        raise UserError(url, f"cannot be read ({reason(error)})", "run the same command again; complete shards are kept") from error


def filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for the URL, with bounded waits, and the path in it.

    Raises:
        UserError: the protocol is unknown, or its package is not installed.
    """
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    try:
        if protocol in ("http", "https"):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_SECONDS, sock_read=TIMEOUT_SECONDS)
            options = {"client_kwargs": {"timeout": timeout, "trust_env": True}, "headers": {"Accept-Encoding": "identity"}}
        elif protocol == "hf":
            hub_client()
        fs, path = url_to_fs(url, **options)
    except ImportError as error:
        package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}.get(protocol)
        remedy = f"pip install {package}" if package else f"install what it asks for: {reason(error)}"
        raise UserError("data.source", f"{url}: a package is missing that opens {protocol}://", remedy) from None
    except ValueError as error:
        remedy = "use hf://, s3://, https:// or a path"
        raise UserError("data.source", f"{url} cannot be opened ({reason(error)})", remedy) from None
    return fs, str(path)


@cache
def hub_client() -> None:
    """Bound every wait of the Hugging Face client, whose session waits for ever by default, and silence what it would print."""
    import huggingface_hub

    session = huggingface_hub.get_session()
    kind, hooks = type(session), session.event_hooks
    huggingface_hub.set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=TIMEOUT_SECONDS))
    for library in ("datasets", "huggingface_hub", "fsspec"):
        logging.getLogger(library).setLevel(logging.ERROR)


@cache
def seekable_bytes(url: str) -> int | None:
    """Return the size of the file, None where it is unknown or the server cannot begin in the middle."""
    fs, path = filesystem(url)
    size: int | None = fetched(url, lambda: fs.info(path).get("size"))
    if size is None or (url.startswith("http") and not fetched(url, lambda: _is_ranged(fs, path, size))):
        return None
    return size


def opened(url: str, size: int | None, *, start: int = 0, stop: int | None = None) -> io.BufferedReader:
    """Return a buffered stream of the file from ``start`` on.

    Args:
        size: bytes of the file; None reads it from its beginning in one stream.
        stop: the end of what is wanted; what is read beyond it comes in small blocks.
    """
    raw: io.RawIOBase
    if size is None:
        raw = _Stream(url)
        assert start == 0
    else:
        raw = RemoteFile(url, size, stop=stop)
        raw.seek(start)
    return io.BufferedReader(raw, READ_BYTES)


class RemoteFile(io.RawIOBase):
    """A file of known size; each read asks for the bytes that are wanted and no others."""

    def __init__(self, url: str, size: int, *, stop: int | None = None) -> None:
        self._url, self._size, self._stop = url, size, size if stop is None else stop
        self._position = 0

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def seekable(self) -> bool:
        """Return that reading can begin anywhere."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Return the new position."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Return how many bytes were put into the buffer; it is filled unless the file or the wanted part of it ends."""
        view = memoryview(buffer).cast("B")
        start = self._position
        end = min(start + len(view), self._size, self._stop if start < self._stop else start + BEYOND_BYTES)
        if end <= start:
            return 0
        view[: end - start] = fetched(self._url, lambda: _block(self._url, start, end))
        self._position = end
        return end - start


class _Stream(io.RawIOBase):
    """A file that can only be read from its beginning; after a failure it is read again up to the place that was reached."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._position = 0
        self._stream: IO[bytes] | None = None

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._drop()
        super().close()

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        raw = fetched(self._url, lambda: self._next(len(view)))
        view[: len(raw)] = raw
        self._position += len(raw)
        return len(raw)

    def _next(self, wanted: int) -> bytes:
        try:
            if self._stream is None:
                fs, path = filesystem(self._url)
                self._stream = fs.open(path, "rb", block_size=0)
                _skip(self._stream, self._position)
            return self._stream.read(wanted)
        except Exception:
            self._drop()
            raise

    def _drop(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(Exception):
                self._stream.close()
            self._stream = None


def _skip(stream: IO[bytes], count: int) -> None:
    while count:
        raw = stream.read(min(count, READ_BYTES))
        if not raw:
            raise EOFError(f"the file ends {counted(count, 'byte')} before the place that was reached")
        count -= len(raw)


def _block(url: str, start: int, stop: int) -> bytes:
    """Return the bytes from ``start`` to ``stop``, all of them."""
    fs, path = filesystem(url)
    if url.startswith("hf://"):
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        headers = {**build_hf_headers(token=fs.token), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        response = get_session().get(fs.url(path), headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        hf_raise_for_status(response)
        raw: bytes = response.content
    else:
        raw = fs.cat_file(path, start, stop)
    if len(raw) != stop - start:
        raise EOFError(f"{counted(len(raw), 'byte')} came instead of {stop - start:,}")
    return raw


def _is_ranged(fs: Any, path: str, size: int) -> bool:
    """Return whether the server can begin in the middle; some send the whole file, whatever is asked for."""
    if size < 2:
        return True
    with fs.open(path, "rb", cache_type="none", size=size) as stream:
        stream.seek(size - 1)
        try:
            return len(stream.read(1)) == 1
        except ValueError:  # how fsspec says that the answer is not the range
            return False


def _answer(error: BaseException) -> tuple[int | None, float]:
    """Return the HTTP status behind an error, None without one, and the seconds the server asked to wait."""
    for place in (error, error.__cause__):
        response = getattr(place, "response", None) or place
        status = getattr(response, "status_code", None) or getattr(response, "status", None)
        if isinstance(status, int):
            return status, _seconds((getattr(response, "headers", None) or {}).get("Retry-After", ""))
    return None, 0.0


def _seconds(retry_after: str) -> float:
    """Return the wait of a Retry-After header, which is a number of seconds or a date (RFC 9110, 10.2.3)."""
    with contextlib.suppress(ValueError):
        return max(0.0, float(retry_after))
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    return 0.0


def _is_hopeless(error: BaseException, status: int | None) -> bool:
    if status is not None:
        return 400 <= status < 500 and status not in LATER
    return isinstance(_cause(error), HOPELESS)


def is_missing(error: BaseException) -> bool:
    """Return whether the error says that the file is not there, and not that the server is not."""
    return _answer(error)[0] in (404, 410) or isinstance(_cause(error), FileNotFoundError)


def _cause(error: BaseException) -> BaseException:
    """Return what is behind the FileNotFoundError that fsspec makes of any failure over HTTP."""
    return error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error


def reason(error: BaseException) -> str:
    """Return what is behind the error in one line: the HTTP status, the first line of its text, or its type where it has none."""
    cause = _cause(error)
    status, _ = _answer(cause)
    if status is not None:
        return f"HTTP {status} {responses.get(status, '')}".rstrip()
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def _tell(line: str) -> None:
    global _told
    if time.monotonic() - _told >= QUIET_SECONDS:
        _told = time.monotonic()
        print(line, file=sys.stderr, flush=True)
