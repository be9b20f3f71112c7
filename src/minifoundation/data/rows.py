"""The documents of a piece, in order.

Nothing that is wrong with a single row stops the stream: it is counted under its reason and passed over.
"""

from __future__ import annotations

import io
import json
import lzma
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import IO, NamedTuple, get_args

from pydantic_core import from_json

from minifoundation.config import DataConfig, QualityFilter
from minifoundation.data.pieces import Piece, Span, pieces
from minifoundation.data.sources import Corpus, find_corpus
from minifoundation.data.streams import parquet, plain, unpacked, unreadable
from minifoundation.errors import UserError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LOOK_BYTES = 1024 * 1024
"""Read at once while the first line end of a span is looked for."""
BATCH_ROWS = 256
EMPTY = "empty"
BROKEN = "broken JSON"
NO_TEXT = "not a string"
REMEDIES = {
    EMPTY: "give files with text in them",
    BROKEN: "write one JSON object a line, with the text in data.text_column",
    NO_TEXT: "set data.text_column to a column of text",
}


class Bad(NamedTuple):
    """A row that cannot become a document."""

    reason: str
    columns: tuple[str, ...] = ()
    """The other columns there are, when the one asked for is missing or holds no text."""


def documents(piece: Piece, config: DataConfig, skipped: Counter[str]) -> Iterator[str]:
    """Yield the documents of the piece in order, none longer than ``max_document_bytes`` of UTF-8.

    Args:
        skipped: counts the rows that were left out, by reason.

    Raises:
        UserError: a file cannot be read to its end, or the rows of a remote one all lack the column.
    """
    columns: tuple[str, ...] = ()
    read = 0
    for document in _documents(piece, config):
        if isinstance(document, Bad):
            skipped[document.reason] += 1
            columns = columns or document.columns
        else:
            read += 1
            yield document
    if columns and not read and any(span.file.remote for span in piece):  # soon enough: the rest of the corpus is like it
        raise _empty(piece[0].file.url, skipped, columns)


def all_documents(source: str, config: DataConfig, skipped: Counter[str] | None = None) -> Iterator[str]:
    """Yield the documents of a whole source in order.

    Raises:
        UserError: as :func:`documents`; the source is not there, or holds no document at all.
    """
    counts: Counter[str] = Counter() if skipped is None else skipped
    corpus = find_corpus(source, config)
    read = False
    for piece in pieces(corpus, config):
        for document in documents(piece, config, counts):
            read = True
            yield document
    if not read:
        raise no_documents(corpus, config, counts)


def no_documents(corpus: Corpus, config: DataConfig, skipped: Mapping[str, int]) -> UserError:
    """Return the error for a corpus without a single document: why, and which columns it has when the one asked for is missing."""
    bad = (document for piece in pieces(corpus, config) for document in _documents(piece, config) if isinstance(document, Bad))
    return _empty(corpus.source, skipped, next((row.columns for row in islice(bad, 100_000) if row.columns), ()))


def _empty(source: str, skipped: Mapping[str, int], columns: tuple[str, ...]) -> UserError:
    counts = Counter(skipped).most_common()
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts)
    most = counts[0][0] if counts else EMPTY
    by_filter = most.partition(":")[0] in get_args(QualityFilter) or most == "duplicate"
    usual = "leave that filter out" if by_filter else "give text in UTF-8"
    remedy = f"set data.text_column to one of: {', '.join(columns)}" if columns else REMEDIES.get(most, usual)
    return UserError("data.source", f"{source} holds no document" + (f" ({reasons})" if reasons else ""), remedy)


def _documents(piece: Piece, config: DataConfig) -> Iterator[str | Bad]:
    """Yield each document and each row that is none."""
    import pyarrow as pa

    for span in piece:
        try:
            for row in _rows(span, config):
                if isinstance(row, Bad):
                    yield row
                else:
                    yield from _checked(row, config.max_document_bytes)
        except (EOFError, OSError, pa.ArrowException, zlib.error, lzma.LZMAError) as error:
            raise unreadable(span.file, error) from error


def _rows(span: Span, config: DataConfig) -> Iterator[str | bytes | Bad]:
    """Yield the text of each row, before it is checked and cut."""
    kind, compression = span.file.form
    if kind == ".parquet":
        yield from _parquet_rows(span, config.text_columns)
        return
    with unpacked(span.file) if compression else plain(span.file, max(0, span.start - 1), span.stop) as stream:
        lines = _Lines(stream, span)
        if kind == ".txt":
            parts = _cut(lines, config.max_document_bytes)
            yield from (part for part in parts if part or span.start == 0)  # a span in which no line begins is no empty document
        else:
            yield from _json_rows(lines, config.text_columns)


class _Lines:
    """The lines that begin in a span, one by one or as a stream of their bytes; the last may end beyond it."""

    def __init__(self, stream: IO[bytes], span: Span) -> None:
        """Go to the first line; the stream stands at the start of the file, or one byte before the span."""
        assert isinstance(stream, io.BufferedReader)
        self._stream = stream
        self._stop = sys.maxsize if span.stop is None else span.stop
        self._position = max(0, span.start - 1)
        if span.start == 0 and stream.peek(3).startswith(BYTE_ORDER_MARK):
            self._position = len(stream.read(3))
        passed = b"" if span.start else b"\n"
        while not passed.endswith(b"\n") and self._position < self._stop:
            passed = self._taken(stream.readline(min(LOOK_BYTES, self._stop - self._position)))
        self._ended = self._position >= self._stop

    def __iter__(self) -> Iterator[bytes]:
        while self._position < self._stop and (line := self._taken(self._stream.readline())):
            yield line

    def read(self, count: int) -> bytes:
        """Return the next ``count`` bytes, fewer only at the end."""
        parts = []
        last = self._stop - 1  # whether the line that holds this byte ends with it, only the byte tells
        while count and not self._ended:
            part = self._taken(
                self._stream.read(min(count, last - self._position)) if self._position < last else self._stream.readline(count)
            )
            self._ended = not part or (self._position > last and part.endswith(b"\n"))
            count -= len(part)
            parts.append(part)
        return b"".join(parts)

    def _taken(self, part: bytes) -> bytes:
        if not part and self._position < self._stop < sys.maxsize:
            raise EOFError("it is shorter than it was")
        self._position += len(part)
        return part


def _checked(row: str | bytes, limit: int) -> Iterator[str | Bad]:
    """Yield the row as documents of at most ``limit`` bytes."""
    try:
        raw = row.encode() if isinstance(row, str) else row
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        yield Bad("not UTF-8")
        return
    for part in _cut(io.BytesIO(raw), limit) if len(raw) > limit else (raw,):
        if b"\0" in part:
            yield Bad("NUL byte")
            continue
        try:
            text = row if part is raw and isinstance(row, str) else part.decode()
        except UnicodeDecodeError:
            yield Bad("not UTF-8")
            continue
        yield text if text and not text.isspace() else Bad(EMPTY)


def _cut(stream: IO[bytes] | _Lines, limit: int) -> Iterator[bytes]:
    """Yield the stream in parts of at most ``limit`` bytes that end at line ends, or at a character where a line is longer."""
    part = stream.read(limit + 1)
    while len(part) > limit:
        end = part.rfind(b"\n", 0, limit) + 1
        if end == 0:
            end = limit
            while end > limit - 4 and part[end] & 0xC0 == 0x80:
                end -= 1
        yield part[:end]
        part = part[end:] + stream.read(limit + 1 - (len(part) - end))
    yield part


def _json_rows(lines: Iterable[bytes], columns: Sequence[str]) -> Iterator[str | Bad]:
    for line in lines:
        if line.isspace():
            continue
        try:
            row = _parsed(line)
        except UnicodeDecodeError:
            yield Bad("not UTF-8")
        except (ValueError, RecursionError):  # ValueError: broken, or a number of more digits than Python reads
            yield Bad(BROKEN)
        else:
            yield _field(row, columns) if isinstance(row, dict) else Bad(BROKEN)


def _parsed(line: bytes) -> object:
    """Return the value of a line of JSON as Python's own parser has it, in less than half the time.

    Raises:
        ValueError, RecursionError: it is not UTF-8 or no JSON.
    """
    try:
        return from_json(line, cache_strings="keys")
    except ValueError:  # also for what Python accepts: half of a surrogate pair, lists within lists within 200 more
        return json.loads(line.decode())


def _field(row: Mapping[str, object], columns: Sequence[str]) -> str | Bad:
    column = next((name for name in columns if name in row), None)
    if column is None:
        return Bad(f"no column {columns[0]!r}", tuple(row))
    value = row[column]
    if value is None:
        return Bad("null")
    return value if isinstance(value, str) else Bad(NO_TEXT, tuple(name for name in row if name != column))


def _parquet_rows(span: Span, columns: Sequence[str]) -> Iterator[bytes | Bad]:
    import pyarrow as pa

    with parquet(span.file) as file:
        groups = range(span.start, file.num_row_groups if span.stop is None else span.stop)
        schema = file.schema_arrow
        column = next((name for name in columns if name in schema.names), None)
        if column is None:
            yield from [Bad(f"no column {columns[0]!r}", tuple(schema.names))] * sum(
                file.metadata.row_group(group).num_rows for group in groups
            )
            return
        kind = schema.field(schema.names.index(column)).type  # the first of that name, as ``batch.column(0)`` is
        if pa.types.is_dictionary(kind):  # each value stored once, as pandas stores categories
            kind = kind.value_type
        others = tuple(name for name in schema.names if name != column)
        textual = kind in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())
        for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=list(groups), columns=[column]):
            values = batch.column(0)
            # As bytes: one row that is not UTF-8 must not take the batch with it.
            for value in values.cast(pa.large_binary()).to_pylist() if textual else values.is_valid().to_pylist():
                yield value if isinstance(value, bytes) else Bad(NO_TEXT, others) if value else Bad("null")
