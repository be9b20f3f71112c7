import gzip
import io
import itertools
import json
import lzma
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minifoundation.config import DataConfig
from minifoundation.data import sources
from minifoundation.data.sources import documents, source_id
from minifoundation.errors import UserError


def read(source: Path | str, **settings: Any) -> tuple[list[str], dict[str, int]]:
    skipped: Counter[str] = Counter()
    found = list(documents(DataConfig(source=str(source), **settings), skipped=skipped))
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


def test_a_corpus_of_bad_rows_only_is_an_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x", "id": 1}\n{"body": "y", "id": 2}\n')
    with pytest.raises(UserError, match=r"holds no document \(2 no column 'text'\); set data.text_column to one of: body, id"):
        read(tmp_path)
    assert read(tmp_path, text_column="body") == (["x", "y"], {})
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": ""}\n{"text": null}\n')
    with pytest.raises(UserError, match=r"holds no document \(2 null, 1 empty\)"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("finewebb", "'finewebb' is neither a known corpus nor a path; did you mean fineweb?"),
        ("{tmp}/corpis", "neither a known corpus nor a path; did you mean {tmp}/corpus?"),
        ("{tmp}/zzz", "give one of fineweb, fineweb-edu, slimpajama, org/name of the Hub, or a path"),
        ("{tmp}/corpus", "holds no .txt, .jsonl or .parquet file (plain or .gz, .zst, .xz); give a file or a folder of these"),
        ("{tmp}/corpus/notes.md", "is not a .txt, .jsonl or .parquet file (plain or .gz, .zst, .xz); give a file or a folder of these"),
    ],
)
def test_a_corpus_that_is_not_there_names_the_nearest(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "notes.md").write_text("# notes")
    with pytest.raises(UserError) as error:
        read(source.format(tmp=tmp_path))
    assert message.format(tmp=tmp_path) in str(error.value)


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
    pieces = [piece.decode() for piece in sources._cut(io.BytesIO(text.encode()), limit)]
    assert "".join(pieces) == text
    assert all(len(piece.encode()) <= limit for piece in pieces)
    for piece, following in itertools.pairwise(pieces):
        assert piece.endswith("\n") or ("\n" not in piece and len((piece + following[0]).encode()) > limit)
    wanted = [piece for piece in pieces if not piece.isspace()]
    if wanted:
        assert read(path, max_document_bytes=limit)[0] == wanted


@given(st.binary(max_size=2000), st.integers(8, 50))
def test_bytes_that_are_no_text_are_cut_without_loss_too(raw: bytes, limit: int) -> None:
    pieces = list(sources._cut(io.BytesIO(raw), limit))
    assert b"".join(pieces) == raw
    assert all(len(piece) <= limit for piece in pieces)


@pytest.mark.parametrize("skip", [0, 1, 5, 7])
def test_skip_passes_over_documents_and_still_counts_what_was_left_out(tmp_path: Path, skip: int) -> None:
    rows = [{"text": None}, *({"text": f"{n} " * 200} for n in range(3)), {"text": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(source=str(tmp_path), max_document_bytes=256)
    everything = list(documents(config))
    skipped: Counter[str] = Counter()
    assert list(documents(config, skip=skip, skipped=skipped)) == everything[skip:]
    assert skipped == {"null": 2}


def test_memory_does_not_grow_with_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a line of text that is repeated\n" * 1_000_000)
    config = DataConfig(source=str(tmp_path), max_document_bytes=65_536)
    tracemalloc.start()
    try:
        assert sum(len(text) for text in documents(config)) == 32_000_000
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_source_id_tells_a_changed_corpus_and_not_where_it_lies(tmp_path: Path) -> None:
    def made(name: str, **files: str) -> dict[str, Any]:
        (tmp_path / name).mkdir()
        for stem, text in files.items():
            (tmp_path / name / f"{stem}.txt").write_text(text)
        return source_id(DataConfig(source=str(tmp_path / name)))

    first = made("one", a="text", b="more")
    assert first == made("two", a="text", b="more")
    assert json.loads(json.dumps(first)) == first
    others = [made("three", a="texT", b="more"), made("four", a="text", c="more"), made("five", a="text"), made("six", a="textm", b="ore")]
    assert first not in others
    assert source_id(DataConfig(source="fineweb")) == {"hub": "HuggingFaceFW/fineweb", "subset": "sample-10BT", "column": "text"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Rows that load_dataset streams, an exception among them being raised; its calls are appended."""
    import datasets
    import huggingface_hub

    rows: list[Any] = []

    def load_dataset(path: str, **options: Any) -> Iterator[Any]:
        assert (path, options) == ("HuggingFaceFW/fineweb-edu", {"name": "sample-10BT", "split": "train", "streaming": True})
        for row in rows:
            if isinstance(row, Exception):
                raise row
            yield row

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    return rows


def test_a_hub_name_streams_its_rows(hub: list[Any]) -> None:
    hub += [{"text": "one", "url": "x"}, {"text": None, "url": "y"}, {"text": "two", "url": "z"}]
    assert read("fineweb-edu") == (["one", "two"], {"null": 1})
    assert list(documents(DataConfig(source="fineweb-edu"), skip=1)) == ["two"]


@pytest.mark.parametrize(
    ("source", "repository", "subset"), [("org/some-text", "org/some-text", None), ("org/t.ext_2:en", "org/t.ext_2", "en")]
)
def test_any_data_set_of_the_hub_streams_by_its_name(
    monkeypatch: pytest.MonkeyPatch, source: str, repository: str, subset: str | None
) -> None:
    import datasets
    import huggingface_hub

    asked: list[Any] = []

    def load_dataset(path: str, **options: Any) -> list[Any]:
        asked.append((path, options["name"]))
        return [{"text": "one"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    assert read(source) == (["one"], {})
    assert asked == [(repository, subset)]
    assert source_id(DataConfig(source=source)) == {"hub": repository, "subset": subset, "column": "text"}


def test_a_path_is_not_taken_for_a_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "text.txt").write_text("one")
    assert read("corpus/text.txt") == (["one"], {})
    with pytest.raises(UserError, match=r"'corpus/texd\.txt' is neither a known corpus nor a path; did you mean corpus/text\.txt\?"):
        read("corpus/texd.txt")


def test_a_hub_stream_that_breaks_off_is_one_line(hub: list[Any]) -> None:
    hub += [{"text": "one"}, ConnectionError("Server disconnected\nwith a long story")]
    with pytest.raises(UserError, match=r"broke off after 1 rows: Server disconnected; run the same line again; complete shards are kept$"):
        read("fineweb-edu")


def test_a_hub_column_that_is_missing_is_found_at_the_first_row(hub: list[Any]) -> None:
    hub += [{"text": "one", "url": "x"}, RuntimeError("read on")]
    with pytest.raises(UserError, match=r"set data.text_column to one of: text, url"):
        read("fineweb-edu", text_column="body")
