import gzip
import io
import itertools
import json
import lzma
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minifoundation.config import DataConfig
from minifoundation.data import pieces, remote, rows
from minifoundation.data.rows import all_documents, no_documents
from minifoundation.data.sources import find_corpus
from minifoundation.errors import UserError


def read(source: Path | str, **settings: Any) -> tuple[list[str], dict[str, int]]:
    skipped: Counter[str] = Counter()
    found = list(all_documents(str(source), DataConfig(source=str(source), **settings), skipped))
    return found, dict(skipped)


def zstd(raw: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(raw)
    return bytes(out.getvalue())


PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}
TEXTS = ["first document\n", "zweites Dokument: äöü", "三番目\r\n\tindented  twice "]


def contents(kind: str) -> bytes:
    match kind:
        case ".txt":
            return TEXTS[2].encode()
        case ".jsonl":
            return "\n".join(json.dumps({"text": text, "n": 1}, ensure_ascii=False) for text in TEXTS).encode()
        case _:
            out = io.BytesIO()
            pq.write_table(pa.table({"n": [1, 2, 3], "text": TEXTS}), out)
            return out.getvalue()


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_every_form_of_file_gives_its_documents(tmp_path: Path, kind: str, packing: str) -> None:
    path = tmp_path / f"corpus{kind}{packing}"
    path.write_bytes(PACK[packing](contents(kind)))
    assert read(path) == (TEXTS[2:] if kind == ".txt" else TEXTS, {})


def test_a_tree_is_read_in_the_order_of_names_without_hidden_and_foreign_files(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.txt", "a.txt", "B.TXT", ".cache/x.txt", "b/._2.txt", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == (["B.TXT", "a.txt", "b/10.txt", "b/2.txt"], {})


def test_bad_rows_are_counted_by_reason_and_the_others_kept(tmp_path: Path) -> None:
    lines = [
        b'{"text": "good"}',
        b"",
        b'{"text": null}',
        b'{"text": ""}',
        b'{"text": " \\n\\t"}',
        b'{"text": 7}',
        b'{"body": "x"}',
        b'{"text": "cut off',
        b'["a list"]',
        b'{"text": "\xff"}',
        b'{"text": "half a pair \\ud800"}',
        b'{"text": "binary\\u0000"}',
        b'{"text": "good too"}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "b.txt").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "d.txt").write_bytes("a text in UTF-16".encode("utf-16-le"))
    (tmp_path / "e.txt").write_bytes(b"\xef\xbb\xbfmarked")
    table = pa.table({"text": pa.array([b"fine", None, b"\xff\xfe", b""], pa.binary()).view(pa.string())})
    pq.write_table(table, tmp_path / "f.parquet")
    pq.write_table(pa.table({"text": [1, None]}), tmp_path / "g.parquet")
    pq.write_table(pa.table({"body": ["x", "y"]}), tmp_path / "h.parquet")
    assert read(tmp_path) == (
        ["good", "good too", "marked", "fine"],
        {"null": 3, "empty": 4, "not a string": 2, "no column 'text'": 3, "broken JSON": 2, "not UTF-8": 4, "NUL byte": 2},
    )


def test_a_column_of_categories_is_text(tmp_path: Path) -> None:
    values = ["one", "two", "one", None]
    for kind in (pa.string(), pa.large_string()):
        pq.write_table(pa.table({"text": pa.array(values, kind).dictionary_encode()}), tmp_path / "a.parquet")
        assert read(tmp_path) == (["one", "two", "one"], {"null": 1})


@pytest.mark.parametrize("kind", [pa.string_view(), pa.binary_view(), pa.large_string(), pa.large_binary()])
def test_text_of_every_type_of_arrow_is_text(tmp_path: Path, kind: pa.DataType) -> None:
    values = [text.encode() for text in TEXTS]
    pq.write_table(pa.table({"text": pa.array([*values, None], pa.binary()).cast(kind)}), tmp_path / "a.parquet")
    assert read(tmp_path) == (TEXTS, {"null": 1})


def test_of_two_columns_of_one_name_the_first_is_read(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(TEXTS), pa.array([1, 2, 3])], names=["text", "text"]), tmp_path / "a.parquet")
    assert read(tmp_path) == (TEXTS, {})


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": 5, "body": "x"}', r"\(2 not a string\); set data.text_column to one of: body"),
        ('{"text": 5}', r"\(2 not a string\); set data.text_column to a column of text"),
        ("text", r"\(2 broken JSON\); write one JSON object a line, with the text in data.text_column"),
        ('{"text": ""}', r"\(2 empty\); give files with text in them"),
        ('{"text": "\\u0000"}', r"\(2 NUL byte\); give text in UTF-8"),
    ],
)
def test_the_remedy_is_that_of_what_is_wrong_most_often(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "a.jsonl").write_text(f"{line}\n{line}\n")
    with pytest.raises(UserError, match=problem):
        read(tmp_path)


def test_what_a_filter_dropped_is_not_said_to_be_of_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain text")
    config = DataConfig(source=str(tmp_path))
    corpus = find_corpus(str(tmp_path), config)
    for reason in ("fineweb: char_dup_ratio", "duplicate"):
        assert str(no_documents(corpus, config, {reason: 20})).endswith(f"(20 {reason}); leave that filter out")
    assert str(no_documents(corpus, config, {"strange": 1})).endswith("give text in UTF-8")


def test_a_window_too_large_for_the_reader_is_no_damage(tmp_path: Path) -> None:
    import zstandard

    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    writer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(writer.compress(b'{"text": "one"}\n') + writer.flush())
    with pytest.raises(UserError, match=r"its window is larger than 128 MiB: unpack it with zstd -d --long=31"):
        read(tmp_path)


def test_the_first_of_several_columns_that_a_row_has_is_its_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "content": "no"}\n{"content": "two"}\n{"text,content": "three"}\n{"body": "no"}\n')
    pq.write_table(pa.table({"id": [1, 2], "content": ["four", None]}), tmp_path / "b.parquet")
    assert read(tmp_path, text_column="text,content") == (["one", "two", "three", "four"], {"no column 'text,content'": 1, "null": 1})
    assert read(tmp_path, text_column="text, content")[0] == ["one", "two", "four"]


@pytest.mark.parametrize("column", ["", " ", "text,"])
def test_a_column_without_a_name_is_refused(column: str) -> None:
    with pytest.raises(ValueError, match="give the name of a column"):
        DataConfig(source="x", text_column=column)


def test_a_piece_in_which_no_line_begins_is_no_empty_document(tmp_path: Path) -> None:
    text = "words " * 4_000_000  # 24 MB in one line: three pieces, of which the first has it all
    (tmp_path / "a.txt").write_text(text)
    documents, skipped = read(tmp_path, max_document_bytes=10_000_000)
    assert "".join(documents) == text and skipped == {}


def test_a_corpus_of_bad_rows_only_is_an_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x", "id": 1}\n{"body": "y", "id": 2}\n')
    with pytest.raises(UserError, match=r"holds no document \(2 no column 'text'\); set data.text_column to one of: body, id"):
        read(tmp_path)
    assert read(tmp_path, text_column="body") == (["x", "y"], {})
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": ""}\n{"text": null}\n')
    with pytest.raises(UserError, match=r"holds no document \(2 null, 1 empty\)"):
        read(tmp_path)


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_a_file_that_breaks_off_is_named(tmp_path: Path, kind: str, packing: str) -> None:
    whole = PACK[packing](contents(kind) if kind == ".parquet" else contents(kind) * 5000)
    path = tmp_path / f"corpus{kind}{packing}"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read to its end") as error:
        read(path)
    assert error.value.where == str(path)
    assert "\n" not in str(error.value)
    path.write_bytes(b"")  # as a download leaves it that has not begun
    with pytest.raises(UserError, match="cannot be read to its end") as error:
        read(path)
    assert error.value.where == str(path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.txt.gz", "a.txt.xz", "a.txt.zst"):
        (tmp_path / name).write_bytes(b"this is none of these formats, whatever its name says")
        with pytest.raises(UserError, match="cannot be read to its end") as error:
            read(tmp_path / name)
        assert error.value.where == str(tmp_path / name)


runs = st.lists(st.tuples(st.sampled_from("a\n é三🙂"), st.integers(1, 400)), min_size=1, max_size=12)


@given(runs.map(lambda runs: "".join(letter * n for letter, n in runs)), st.integers(256, 300), st.sampled_from([".txt", ".jsonl"]))
def test_long_documents_are_cut_without_loss(tmp_path_factory: pytest.TempPathFactory, text: str, limit: int, kind: str) -> None:
    path = tmp_path_factory.mktemp("cut") / f"a{kind}"
    path.write_bytes((text if kind == ".txt" else json.dumps({"text": text})).encode())
    pieces = [piece.decode() for piece in rows._cut(io.BytesIO(text.encode()), limit)]
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= limit for piece in pieces)
    for piece, following in itertools.pairwise(pieces):
        assert piece.endswith("\n") or ("\n" not in piece and len((piece + following[0]).encode()) > limit)
    wanted = [piece for piece in pieces if not piece.isspace()]
    if wanted:
        assert read(path, max_document_bytes=limit)[0] == wanted


@given(st.binary(max_size=2000), st.integers(8, 50))
def test_bytes_that_are_no_text_are_cut_without_loss_too(raw: bytes, limit: int) -> None:
    pieces = list(rows._cut(io.BytesIO(raw), limit))
    assert b"".join(pieces) == raw
    assert all(len(piece) <= limit for piece in pieces)


def test_memory_does_not_grow_with_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a line of text that is repeated\n" * 1_000_000)
    config = DataConfig(source=str(tmp_path), max_document_bytes=65_536)
    tracemalloc.start()
    try:
        assert sum(len(text) for text in all_documents(str(tmp_path), config)) == 32_000_000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("packing", [".gz", ".xz", ".zst"])
def test_files_of_several_compressed_parts_are_read_to_the_end(tmp_path: Path, packing: str) -> None:
    lines = [json.dumps({"text": text}).encode() + b"\n" for text in TEXTS]
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(b"".join(PACK[packing](line) for line in lines))
    assert read(path) == (TEXTS, {})


def test_zstd_frames_to_skip_are_skipped(tmp_path: Path) -> None:
    skip = (0x184D2A50).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"notes"
    parts = [zstd(json.dumps({"text": text}).encode() + b"\n") for text in TEXTS]
    (tmp_path / "a.jsonl.zst").write_bytes(skip + parts[0] + skip + parts[1] + parts[2] + skip)
    assert read(tmp_path) == (TEXTS, {})


def test_numbers_longer_than_python_reads_are_broken_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "n": ' + "9" * 5000 + '}\n{"text": "b"}\n' + "[" * 100_000 + "\n")
    assert read(tmp_path) == (["b"], {"broken JSON": 2})


@given(st.lists(st.one_of(st.binary(max_size=300), st.text(max_size=100).map(str.encode)), max_size=8), st.sampled_from([".txt", ".jsonl"]))
def test_nothing_in_a_file_stops_the_reading(tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], kind: str) -> None:
    folder = tmp_path_factory.mktemp("odd")
    (folder / f"a{kind}").write_bytes(b"\n".join(parts))
    (folder / "b.jsonl").write_text('{"text": "the last"}')
    found, skipped = read(folder, max_document_bytes=256)
    assert found[-1] == "the last"
    assert all(count > 0 for count in skipped.values())


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters())),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=4)),
)


@given(values, st.booleans(), st.tuples(st.integers(0, 200), st.binary(max_size=3)))
def test_a_line_is_parsed_as_pythons_own_parser_does_it(value: object, ascii_only: bool, damage: tuple[int, bytes]) -> None:
    whole = json.dumps(value, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    place, bytes_ = damage
    for line in (whole, whole[:place] + bytes_ + whole[place + 1 :]):
        try:
            expected = json.dumps(json.loads(line.decode()))
        except ValueError as error:
            with pytest.raises(type(error)):
                rows._parsed(line)
        else:
            assert json.dumps(rows._parsed(line)) == expected


def test_any_file_system_gives_the_same_documents(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for kind in (".txt", ".jsonl", ".parquet"):
        for packing, pack in PACK.items():
            (tmp_path / f"a{kind}{packing}").write_bytes(pack(contents(kind)))
            memory.pipe(f"/corpus/a{kind}{packing}", pack(contents(kind)))
    assert len(read(tmp_path)[0]) == 4 + 2 * 4 * 3
    assert read("memory://corpus") == read(tmp_path)


@pytest.mark.parametrize("form", [".txt", ".jsonl", ".parquet", ".jsonl.gz", ".jsonl.zst", ".jsonl.xz", ".parquet.gz"])
def test_a_network_that_fails_ends_in_one_line_in_every_form(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoders in other languages must let the error through."""
    kind, packing = next((kind, form.removeprefix(kind)) for kind in (".txt", ".jsonl", ".parquet") if form.startswith(kind))
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe(f"/corpus/a{form}", PACK[packing](contents(kind)))

    def broken(*_: object) -> bytes:
        raise TimeoutError("timed out")

    monkeypatch.setattr(remote, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(type(memory), "cat_file", broken)
    with pytest.raises(UserError, match=r"cannot be read \(timed out\); run the same command again; complete shards are kept$") as error:
        read("memory://corpus")
    assert error.value.where.endswith(f"/corpus/a{form}")
    assert "\n" not in str(error.value)


def test_a_remote_column_that_is_missing_is_found_at_the_first_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for name in ("a", "b"):
        memory.pipe(f"/corpus/{name}.jsonl", b'{"body": "x", "id": 1}\n')
    monkeypatch.setattr(pieces, "PIECE_BYTES", 10)
    with pytest.raises(UserError, match=r"a\.jsonl holds no document \(1 no column 'text'\); set data.text_column to one of: body, id$"):
        read("memory://corpus")
