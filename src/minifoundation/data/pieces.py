"""The units of work of a corpus: fixed spans of its files, which depend on the corpus alone, never on the number of workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from minifoundation.config import DataConfig
from minifoundation.data.sources import Corpus, File
from minifoundation.data.streams import file_bytes, parquet, unreadable

PIECE_BYTES = 8 * 1024 * 1024
"""Text in a piece: about half a second of work, so that workers end together, and much more than it costs to hand out."""
EXPANSION = 4
"""Text in a compressed file, over its size: about what zstd makes of English."""
FILE_BYTES = 4096
"""What a file counts for at least, so that a piece holds a bounded number of empty ones."""


@dataclass(frozen=True)
class Span:
    """A part of one file: bytes of a plain one (the lines that begin there), row groups of a Parquet one, or all (0, None)."""

    file: File
    start: int
    stop: int | None


Piece = tuple[Span, ...]


def pieces(corpus: Corpus, config: DataConfig, *, file: int = 0, start: int = 0) -> Iterator[Piece]:
    """Yield the pieces of the corpus in order; a file is not looked into before its turn.

    Spans are put together until they would hold more than PIECE_BYTES of text. A single row group or compressed file is never
    cut, whatever it holds.

    Args:
        file, start: what ``after`` says of a piece; those after it are yielded, and no file before is looked into.

    Raises:
        UserError: a file is damaged or cannot be reached.
    """
    rest = (each for each in _spans(corpus.files[file : file + 1], config) if each[0].start >= start)
    return _packed(chain(rest, _spans(corpus.files[file + 1 :], config)))


def after(piece: Piece, numbers: Mapping[str, int]) -> tuple[int, int]:
    """Return where the piece after this one begins: the number of a file, and the byte or row group in it.

    Args:
        numbers: of the corpus's files, by their URLs.
    """
    last = piece[-1]
    number = numbers[last.file.url]
    return (number, last.stop) if last.stop else (number + 1, 0)  # an empty file stops at 0


def _packed(spans: Iterator[tuple[Span, int]]) -> Iterator[Piece]:
    piece: list[Span] = []
    filled = 0
    for span, size in spans:
        if piece and filled + size > PIECE_BYTES:
            yield tuple(piece)
            piece, filled = [], 0
        if piece and piece[-1].file is span.file and piece[-1].stop == span.start:
            piece[-1] = replace(piece[-1], stop=span.stop)
        else:
            piece.append(span)
        filled += size
    if piece:
        yield tuple(piece)


def _spans(files: Sequence[File], config: DataConfig) -> Iterator[tuple[Span, int]]:
    """Yield the smallest parts the files are cut into, each with about the bytes of text in it."""
    for file in files:
        kind, compression = file.form
        size = file_bytes(file)
        file = replace(file, size=size)  # so that a worker need not ask again
        if size is None:
            yield Span(file, 0, None), PIECE_BYTES
        elif compression:
            yield Span(file, 0, None), max(size * EXPANSION, FILE_BYTES)
        elif kind == ".parquet":
            for group, text_bytes in enumerate(_row_groups(file, config.text_columns)):
                yield Span(file, group, group + 1), max(text_bytes, FILE_BYTES if group == 0 else 0)
        else:
            # A text is cut where it would be cut anyway, and nowhere else.
            step = max(PIECE_BYTES, config.max_document_bytes) if kind == ".txt" else PIECE_BYTES
            for start in range(0, max(size, 1), step):
                stop = min(start + step, size)
                yield Span(file, start, stop), max(stop - start, FILE_BYTES)


def _row_groups(file: File, columns: Sequence[str]) -> list[int]:
    """Return the uncompressed bytes of the text column in each row group.

    Raises:
        UserError: the file is damaged.
    """
    import pyarrow as pa

    try:
        with parquet(file) as opened:
            metadata = opened.metadata
    except (OSError, pa.ArrowException) as error:
        raise unreadable(file, error) from error
    paths = [metadata.schema.column(index).path for index in range(metadata.num_columns)]
    place = next((paths.index(name) for name in columns if name in paths), None)
    if place is None:
        return [0] * metadata.num_row_groups
    return [metadata.row_group(group).column(place).total_uncompressed_size for group in range(metadata.num_row_groups)]
