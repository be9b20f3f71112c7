"""Documents of a corpus in a fixed order: a data set of the Hugging Face Hub, or files of text on disk.

Nothing that is wrong with a single row stops the stream: it is counted under its reason and passed over.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import logging
import lzma
import re
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any, NamedTuple

from minifoundation.config import DataConfig
from minifoundation.errors import UserError


class HubCorpus(NamedTuple):
    """A data set of the Hugging Face Hub that has a short name here."""

    repository: str
    subset: str | None
    """The data set's own name of a part; None is the whole."""
    instead: str
    """What to use when the Hub does not have it (any more)."""


HUB = {
    "fineweb": HubCorpus("HuggingFaceFW/fineweb", "sample-10BT", "use fineweb-edu"),
    "fineweb-edu": HubCorpus("HuggingFaceFW/fineweb-edu", "sample-10BT", "use fineweb"),
    "slimpajama": HubCorpus(
        "cerebras/SlimPajama-627B", None, "use fineweb-edu, or download a copy such as DKYoon/SlimPajama-6B and give --data its folder"
    ),
}
"""Corpora by short name.

``sample-10BT`` is drawn at random from all crawls and is a few files, so streaming begins at once and the first tokens are as
mixed as the Hub offers them. The default subset is thousands of files crawl after crawl: what a small run reads is 2013 alone.
"""

KINDS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = ("", ".gz", ".zst", ".xz")
FORMS = "a .txt, .jsonl or .parquet file (plain or .gz, .zst, .xz)"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
HUB_TIMEOUT_SECONDS = 10


def hub_corpus(source: str) -> HubCorpus | None:
    """Return the data set of the Hub that ``source`` names, by a short name or as ``org/name`` or ``org/name:subset``; None for a path."""
    if source in HUB:
        return HUB[source]
    named = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?::([\w.-]+))?", source)
    if named is None or Path(source).exists() or Path(source).parent.exists():  # a slip in the name of a file stays a path
        return None
    return HubCorpus(named[1], named[2], "check the name, org/name or org/name:subset, or give --data a path")


class Bad(NamedTuple):
    """A row that cannot become a document."""

    reason: str
    columns: tuple[str, ...] = ()
    """The columns there are, when the one asked for is missing."""


def documents(config: DataConfig, *, skip: int = 0, skipped: Counter[str] | None = None) -> Iterator[str]:
    """Return the documents of the corpus in a fixed order, none longer than ``max_document_bytes`` of UTF-8.

    Args:
        skip: documents to pass over; document number n is the same text in every call.
        skipped: counts the rows that were left out, by reason, from the start of the corpus on.

    Raises:
        UserError: the corpus is not there, cannot be read to its end, or holds no document at all.
    """
    counts: Counter[str] = Counter() if skipped is None else skipped
    columns: tuple[str, ...] = ()
    read = 0
    for row in _rows(config):
        for document in [row] if isinstance(row, Bad) else _documents_of(row, config.max_document_bytes):
            if isinstance(document, Bad):
                counts[document.reason] += 1
                columns = columns or document.columns
                if columns and not read and hub_corpus(config.source):  # one schema: what the first row lacks, all of them lack
                    raise _empty(config, counts, columns)
                continue
            read += 1
            if read > skip:
                yield document
    if read == 0:
        raise _empty(config, counts, columns)


def source_id(config: DataConfig) -> dict[str, Any]:
    """Return what tells this corpus from another or from a changed one, as plain JSON values.

    Files are told apart by their names below the root, their sizes and both their ends; where the root lies does not matter.
    """
    if (hub := hub_corpus(config.source)) is not None:
        return {"hub": hub.repository, "subset": hub.subset, "column": config.text_column}
    root, files = _files(config.source)
    total = 0
    digest = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as stream:
                size = stream.seek(0, io.SEEK_END)
                name = path.relative_to(root).as_posix()
                digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
                for start in (0, max(0, size - 4096)):
                    stream.seek(start)
                    digest.update(stream.read(4096))
        except OSError as error:
            raise _unreadable(path, error) from None
        total += size
    return {"files": len(files), "bytes": total, "sha256": digest.hexdigest(), "column": config.text_column}


def _rows(config: DataConfig) -> Iterator[str | bytes | Bad]:
    """Yield the text of each row, before it is checked and cut."""
    if (hub := hub_corpus(config.source)) is not None:
        yield from _hub_rows(config.source, hub, config.text_column)
        return
    from pyarrow import ArrowException

    for path in _files(config.source)[1]:
        try:
            yield from _file_rows(path, config)
        except (EOFError, OSError, ArrowException, zlib.error, lzma.LZMAError) as error:
            raise _unreadable(path, error) from error


def _documents_of(row: str | bytes, limit: int) -> Iterator[str | Bad]:
    """Yield the row as documents of at most ``limit`` bytes."""
    try:
        raw = row.encode() if isinstance(row, str) else row
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        yield Bad("not UTF-8")
        return
    for piece in _cut(io.BytesIO(raw), limit) if len(raw) > limit else (raw,):
        if b"\0" in piece:
            yield Bad("NUL byte")
            continue
        try:
            text = piece.decode()
        except UnicodeDecodeError:
            yield Bad("not UTF-8")
            continue
        yield text if text and not text.isspace() else Bad("empty")


def _cut(stream: IO[bytes], limit: int) -> Iterator[bytes]:
    """Yield the stream in pieces of at most ``limit`` bytes that end at line ends, or at a character where a line is longer."""
    piece = stream.read(limit + 1)
    while len(piece) > limit:
        end = piece.rfind(b"\n", 0, limit) + 1
        if end == 0:
            end = limit
            while end > limit - 4 and piece[end] & 0xC0 == 0x80:
                end -= 1
        yield piece[:end]
        piece = piece[end:] + stream.read(limit + 1 - (len(piece) - end))
    yield piece


def _files(source: str) -> tuple[Path, list[Path]]:
    """Return the root and the files of text below it, in the order of their names; hidden ones are left out."""
    root = Path(source).expanduser()
    if root.is_file():
        if _form(root) is None:
            raise UserError("data.source", f"{source} is not {FORMS}", "give a file or a folder of these")
        return root.parent, [root]
    if not root.is_dir():
        raise _unknown(source, root)
    found = {path.relative_to(root): path for path in root.rglob("*") if _form(path) and path.is_file()}
    shown = sorted((name.as_posix(), path) for name, path in found.items() if not any(part.startswith(".") for part in name.parts))
    if not shown:
        raise UserError("data.source", f"{source} holds no {FORMS.removeprefix('a ')}", "give a file or a folder of these")
    return root, [path for _, path in shown]


def _form(path: Path) -> tuple[str, str] | None:
    """Return the kind of file and its compression by name, None for a file that is no text."""
    name = path.name.lower()
    return next(((kind, packed) for kind in KINDS for packed in COMPRESSIONS if name.endswith(kind + packed)), None)


def _file_rows(path: Path, config: DataConfig) -> Iterator[str | bytes | Bad]:
    form = _form(path)
    assert form is not None
    kind, compression = form
    with _opened(path, compression) as stream:
        match kind:
            case ".txt":
                yield from _cut(_without_mark(stream), config.max_document_bytes)
            case ".jsonl":
                yield from _json_rows(_without_mark(stream), config.text_column)
            case ".parquet":
                yield from _parquet_rows(stream, compression, config.text_column)


def _opened(path: Path, compression: str) -> IO[bytes]:
    """Return a buffered stream of the plain bytes, which raises where a compressed file breaks off."""
    match compression:
        case ".gz":
            return io.BufferedReader(gzip.open(path))
        case ".xz":
            return io.BufferedReader(lzma.open(path))
        case ".zst":
            import pyarrow as pa

            # The stream reader of zstandard takes a file that breaks off for one that ends.
            return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
        case _:
            return path.open("rb")


def _without_mark(stream: IO[bytes]) -> IO[bytes]:
    assert isinstance(stream, io.BufferedReader)
    if stream.peek(3).startswith(BYTE_ORDER_MARK):
        stream.read(3)
    return stream


def _json_rows(lines: Iterable[bytes], column: str) -> Iterator[str | Bad]:
    for line in lines:
        if line.isspace():
            continue
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError:
            yield Bad("not UTF-8")
        except (json.JSONDecodeError, RecursionError):
            yield Bad("broken JSON")
        else:
            yield _field(row, column) if isinstance(row, dict) else Bad("broken JSON")


def _field(row: Mapping[str, object], column: str) -> str | Bad:
    if column not in row:
        return Bad(f"no column {column!r}", tuple(row))
    value = row[column]
    if value is None:
        return Bad("null")
    return value if isinstance(value, str) else Bad("not a string")


def _parquet_rows(stream: IO[bytes], compression: str, column: str) -> Iterator[bytes | Bad]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with tempfile.TemporaryFile() as plain:
        if compression:  # Parquet is read from its end
            shutil.copyfileobj(stream, plain)
        file = pq.ParquetFile(plain if compression else stream)
        schema = file.schema_arrow
        if column not in schema.names:
            yield from [Bad(f"no column {column!r}", tuple(schema.names))] * file.metadata.num_rows
            return
        kind = schema.field(column).type
        textual = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            values = batch.column(0)
            # As bytes: one row that is not UTF-8 must not take the batch with it.
            for value in values.cast(pa.large_binary()).to_pylist() if textual else values.is_valid().to_pylist():
                yield value if isinstance(value, bytes) else Bad("not a string" if value else "null")


def _hub_rows(source: str, hub: HubCorpus, column: str) -> Iterator[str | Bad]:
    """Stream a data set of the Hub; ask for it first, since loading retries for half a minute without a network."""
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    place = f"{source} ({hub.repository} on the Hugging Face Hub)" if source in HUB else f"{source} on the Hugging Face Hub"
    try:
        huggingface_hub.HfApi().dataset_info(hub.repository, timeout=HUB_TIMEOUT_SECONDS)
    except RepositoryNotFoundError:
        raise UserError("data.source", f"{place} is not there", hub.instead) from None
    except Exception as error:
        raise UserError(
            "data.source", f"{place} cannot be reached: {_first_line(error)}", "connect to the network, or give --data a path"
        ) from error

    import datasets

    for library in ("datasets", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    read = 0
    try:
        for row in datasets.load_dataset(hub.repository, name=hub.subset, split="train", streaming=True):
            yield _field(row, column)
            read += 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        raise UserError(
            "data.source",
            f"{place} broke off after {read:,} rows: {_first_line(error)}",
            "run the same line again; complete shards are kept",
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _unreadable(path: Path, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return error
    reason = error.strerror if isinstance(error, OSError) and error.strerror else _first_line(error)
    return UserError(str(path), f"cannot be read to its end ({reason})", "fetch the file again, or take it out of the corpus")


def _unknown(source: str, root: Path) -> UserError:
    near = get_close_matches(source, HUB, n=1)
    if not near and root.parent.is_dir():
        near = [str(root.with_name(name)) for name in get_close_matches(root.name, [path.name for path in root.parent.iterdir()], n=1)]
    remedy = f"did you mean {near[0]}?" if near else f"give one of {', '.join(HUB)}, org/name of the Hub, or a path"
    return UserError("data.source", f"{source!r} is neither a known corpus nor a path", remedy)


def _empty(config: DataConfig, counts: Counter[str], columns: tuple[str, ...]) -> UserError:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.most_common())
    remedy = f"set data.text_column to one of: {', '.join(columns)}" if columns else "give text in UTF-8"
    return UserError("data.source", f"{config.source} holds no document" + (f" ({reasons})" if reasons else ""), remedy)
