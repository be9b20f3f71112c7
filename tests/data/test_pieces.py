import gzip
import io
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minifoundation.config import DataConfig
from minifoundation.data import pieces as module
from minifoundation.data.pieces import Piece, after, pieces
from minifoundation.data.rows import documents
from minifoundation.data.sources import File, find_corpus
from minifoundation.errors import UserError


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    monkeypatch.setattr(module, "FILE_BYTES", 1)


def cut(source: Path, **settings: Any) -> tuple[list[Piece], DataConfig]:
    config = DataConfig(source=str(source), **{"max_document_bytes": 256, **settings})
    return list(pieces(find_corpus(str(source), config), config)), config


def spans(source: Path, **settings: Any) -> list[list[tuple[str, int, int | None]]]:
    return [[(span.file.name, span.start, span.stop) for span in piece] for piece in cut(source, **settings)[0]]


def texts(source: Path, **settings: Any) -> list[list[str]]:
    found, config = cut(source, **settings)
    return [list(documents(piece, config, Counter())) for piece in found]


def test_plain_files_are_cut_at_fixed_places_and_small_ones_put_together(tmp_path: Path) -> None:
    for name, size in (("a.txt", 2500), ("b.jsonl", 400), ("c.txt", 100), ("d.txt", 1), ("e.jsonl", 1000), ("f.txt", 0)):
        (tmp_path / name).write_bytes(b"x" * size)
    assert spans(tmp_path) == [
        [("a.txt", 0, 1000)],
        [("a.txt", 1000, 2000)],
        [("a.txt", 2000, 2500), ("b.jsonl", 0, 400), ("c.txt", 0, 100)],
        [("d.txt", 0, 1)],
        [("e.jsonl", 0, 1000)],
        [("f.txt", 0, 0)],
    ]


def test_a_text_is_cut_only_where_it_is_too_long_for_a_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a line\n" * 400)
    assert len(spans(tmp_path, max_document_bytes=2800)) == 1
    assert texts(tmp_path, max_document_bytes=2800) == [["a line\n" * 400]]
    assert len(spans(tmp_path, max_document_bytes=2000)) == 2


def test_compressed_files_are_whole_and_count_for_what_they_expand_to(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt.gz").write_bytes(gzip.compress(name.encode() * 5000) + b"\0" * 60)  # about 100 bytes
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"") + b"\0" * 2000)
    assert [[name for name, *_ in piece] for piece in spans(tmp_path)] == [["a.txt.gz", "b.txt.gz"], ["c.txt.gz"], ["d.txt.gz"]]
    assert {(start, stop) for piece in spans(tmp_path) for _, start, stop in piece} == {(0, None)}


def write_groups(path: Path, *groups: int, column: str = "text") -> None:
    """Row groups whose texts have as many bytes as given, each text twice."""
    schema = pa.schema([("n", pa.int64()), (column, pa.string())])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False, write_statistics=False) as writer:
        for number, size in enumerate(groups):
            text = f"{path.stem} {number} ".ljust(size // 2, "x")
            writer.write_table(pa.table({"n": [number] * 2, column: [text, text.upper()]}))


def test_row_groups_are_put_together_by_the_bytes_of_their_text_across_files(tmp_path: Path) -> None:
    write_groups(tmp_path / "a.parquet", 300, 300, 5000, 200)
    write_groups(tmp_path / "b.parquet", 300, 800)
    found = spans(tmp_path)
    assert found == [
        [("a.parquet", 0, 2)],
        [("a.parquet", 2, 3)],
        [("a.parquet", 3, 4), ("b.parquet", 0, 1)],
        [("b.parquet", 1, 2)],
    ]
    read = [[text.split("x")[0] for text in piece if text[0] in "ab"] for piece in texts(tmp_path, max_document_bytes=10_000)]
    assert read == [["a 0 ", "a 1 "], ["a 2 "], ["a 3 ", "b 0 "], ["b 1 "]]


def test_a_parquet_file_without_the_column_is_one_span(tmp_path: Path) -> None:
    write_groups(tmp_path / "a.parquet", 5000, 5000, column="body")
    found, config = cut(tmp_path)
    skipped: Counter[str] = Counter()
    assert [list(documents(piece, config, skipped)) for piece in found] == [[]]
    assert skipped == {"no column 'text'": 4}


def test_a_file_is_not_looked_into_before_its_turn(tmp_path: Path) -> None:
    write_groups(tmp_path / "a.parquet", 900, 900)
    (tmp_path / "b.parquet").write_bytes(b"no Parquet at all")
    config = DataConfig(source=str(tmp_path))
    found = pieces(find_corpus(str(tmp_path), config), config)
    assert next(found)[0].file.name == "a.parquet"
    with pytest.raises(UserError, match="cannot be read to its end") as error:
        list(found)
    assert error.value.where == str(tmp_path / "b.parquet")


def test_pieces_go_on_after_any_of_them_without_a_look_at_earlier_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("a.txt", 2500), ("b.jsonl", 400), ("c.txt", 0), ("d.txt", 1000), ("e.jsonl", 0), ("h.txt.gz", 300), ("k.txt", 1)):
        (tmp_path / name).write_bytes(b"x" * size)
    write_groups(tmp_path / "f.parquet", 300, 300, 5000, 200)
    write_groups(tmp_path / "g.parquet", 300, 800, 100)
    write_groups(tmp_path / "i.parquet", 900)
    config = DataConfig(source=str(tmp_path), max_document_bytes=256)
    corpus = find_corpus(str(tmp_path), config)
    whole = list(pieces(corpus, config))
    assert len(whole) == 10
    numbers = {file.url: number for number, file in enumerate(corpus.files)}
    looked: list[str] = []

    def watched(file: File) -> int | None:
        looked.append(file.name)
        return file.size

    monkeypatch.setattr(module, "file_bytes", watched)
    for number, piece in enumerate(whole):
        looked.clear()
        file, start = after(piece, numbers)
        assert list(pieces(corpus, config, file=file, start=start)) == whole[number + 1 :]
        assert all(name >= piece[-1].file.name for name in looked)


lines = st.lists(st.sampled_from([0, 1, 2, 9, 10, 11, 19, 20, 21, 29, 55]).map(lambda count: b"x" * count), max_size=14)


@given(lines, st.booleans(), st.integers(1, 25))
def test_each_line_is_in_the_piece_where_it_begins(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ends: bool, piece_bytes: int
) -> None:
    """The oracle is a walk over the bytes of the file."""
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    rows = [json.dumps({"text": f"{number}" + line.decode()}).encode() for number, line in enumerate(lines)]
    raw = b"\n".join(rows) + (b"\n" if ends else b"")
    path.write_bytes(raw)
    wanted: dict[int, list[str]] = {}
    place = 0
    for line in io.BytesIO(raw):
        if line.strip():
            wanted.setdefault(place // piece_bytes, []).append(json.loads(line)["text"])
        place += len(line)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_BYTES", piece_bytes)
        found = texts(path)
    assert found == [wanted.get(number, []) for number in range(max(1, -(-len(raw) // piece_bytes)))]


runs = st.lists(st.tuples(st.sampled_from("a\n é三🙂"), st.integers(1, 700)), min_size=1, max_size=10)


@given(runs.map(lambda runs: "".join(letter * n for letter, n in runs)), st.integers(256, 300), st.integers(256, 1200))
def test_no_byte_of_a_long_text_is_lost_or_read_twice(
    tmp_path_factory: pytest.TempPathFactory, text: str, limit: int, piece_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_BYTES", piece_bytes)
        found = texts(path, max_document_bytes=limit)
    parts = list(itertools.chain.from_iterable(found))
    assert all(len(part.encode()) <= limit for part in parts)
    assert "".join(part for part in parts if not part.isspace()) == "".join(_kept(text, limit, piece_bytes))


def _kept(text: str, limit: int, piece_bytes: int) -> Iterator[str]:
    """The documents by the definition: lines by where they begin, then cut at the last line end that fits, else at a character."""
    step = max(piece_bytes, limit)
    by_piece: dict[int, str] = {}
    place = 0
    for line in io.BytesIO(text.encode()):
        by_piece[place // step] = by_piece.get(place // step, "") + line.decode()
        place += len(line)
    for part in by_piece.values():
        rest = part
        while rest:
            head = rest.encode()[:limit].decode(errors="ignore")
            if len(head) < len(rest) and "\n" in head:
                head = head[: head.rindex("\n") + 1]
            if not head.isspace():
                yield head
            rest = rest[len(head) :]


def test_a_text_of_many_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE_BYTES", 1 << 20)
    text = "\n".join(f"line {number} of a long document, é三🙂" for number in range(150_000)) + "\n" + "y" * 3_000_000 + "\nthe end"
    (tmp_path / "a.txt").write_text(text)
    found = texts(tmp_path, max_document_bytes=65_536)
    assert "".join(itertools.chain.from_iterable(found)) == text
    assert [] in found  # the ranges within the long line


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize("left", [0, 700, 1500])
def test_a_file_that_has_become_shorter_is_named(tmp_path: Path, kind: str, left: int) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b'{"text": "a line"}\n' * 200)
    found, config = cut(path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match=r"cannot be read to its end \(it is shorter than it was\); fetch the file again") as error:
        list(documents(found[1], config, Counter()))
    assert error.value.where == str(path)
