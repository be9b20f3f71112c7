import gzip
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest

from minifoundation.config import DataConfig
from minifoundation.data import remote, sources
from minifoundation.data.hub import HUB, hub_corpus
from minifoundation.data.rows import all_documents
from minifoundation.data.sources import Corpus, find_corpus
from minifoundation.errors import UserError
from tests.data.hub_server import Fault, hub


def found(source: Path | str, **settings: Any) -> Corpus:
    return find_corpus(str(source), DataConfig(source=str(source), **settings))


def names(source: Path | str) -> list[str]:
    return [file.name for file in found(source).files]


def read(source: str) -> list[str]:
    return list(all_documents(source, DataConfig(source=source)))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b/2.txt", "b/10.txt", "a.txt", "B.TXT", ".cache/x.txt", "b/._2.txt", "README.md", "b/c/[1].jsonl", "b/é.txt", "b/z.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_folders_behind_links_are_read_once(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("disk")
    (elsewhere / "far.txt").write_text("far")
    (tree / "b" / "disk").symlink_to(elsewhere)
    (tree / "again").symlink_to(tree / "b")
    (tree / "b" / "c" / "up").symlink_to(tree)
    assert names(tree) == sorted([*ORDER, "b/disk/far.txt"], key=str.encode)


def test_a_link_to_what_is_not_there_is_no_silent_loss(tree: Path) -> None:
    (tree / "README.txt.orig").symlink_to("nowhere")  # no file of text by its name
    assert names(tree) == ORDER
    link = tree / "b" / "lost.txt"
    for target in ("nowhere.txt", link.name):
        link.symlink_to(target)
        for source in (tree, f"{tree}/b/*.txt"):
            with pytest.raises(UserError, match=r"b/lost\.txt: is a link to what is not there; mend that, or take it out of the corpus"):
                names(source)
        with pytest.raises(UserError, match=r"lost\.txt is neither a file nor a folder, nor a link to one; give a \.txt, "):
            names(link)
        link.unlink()
    with pytest.raises(UserError, match="/dev/null is neither a file nor a folder"):
        names("/dev/null")


ORDER = ["B.TXT", "a.txt", "b/10.txt", "b/2.txt", "b/c/[1].jsonl", "b/z.txt", "b/é.txt"]


def test_a_tree_is_in_the_order_of_the_bytes_of_names_without_hidden_and_foreign_files(tree: Path) -> None:
    corpus = found(tree)
    assert names(tree) == names(f"{tree}/") == names(f"file://{tree}") == ORDER
    assert [Path(file.url).read_text() for file in corpus.files] == ORDER
    assert [file.size for file in corpus.files] == [len(name.encode()) for name in ORDER]
    assert pickle.loads(pickle.dumps(corpus)) == corpus


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("b/*.txt", ["10.txt", "2.txt", "z.txt", "é.txt"]),
        ("**/*.jsonl", ["b/c/[1].jsonl"]),
        ("b/[0-9]*.txt", ["10.txt", "2.txt"]),
        ("b/c/[1].jsonl", ["[1].jsonl"]),  # a file of that name, not the pattern
        ("*/?.txt", ["b/2.txt", "b/z.txt", "b/é.txt"]),
        ("b/c/**", ["[1].jsonl"]),
    ],
)
def test_patterns_mean_the_files_that_match(tree: Path, pattern: str, wanted: list[str]) -> None:
    assert names(tree / pattern) == wanted


def test_two_stars_stand_alone(tree: Path) -> None:
    with pytest.raises(UserError, match=r"\*\*\.txt: \*\* beside other letters; write \*\* as a whole part of the path"):
        names(tree / "b" / "**.txt")


def test_a_file_that_a_pattern_matches_in_several_ways_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b" / "b").mkdir(parents=True)
    (tmp_path / "b" / "b" / "a.txt").write_text("once")
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: [*glob(path, pattern)] * 2)  # what Python 3.13 does
    assert names(tmp_path / "**" / "b" / "**" / "*.txt") == ["b/b/a.txt"]


def test_packed_json_is_lines_and_a_plain_one_notes(tmp_path: Path) -> None:
    (tmp_path / "c4-train.00000.json.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    (tmp_path / "dataset_info.json").write_text("{}")
    assert read(str(tmp_path)) == ["one", "two"]
    (tmp_path / "c4-train.00000.json.gz").rename(tmp_path / "a.csv.gz")
    with pytest.raises(UserError, match=r"holds no \.txt.*, only \.csv\.gz, \.json; give"):
        names(tmp_path)


def test_names_that_are_not_utf_8_have_a_place_too(tmp_path: Path) -> None:
    for name in (b"\xff.txt", "é.txt".encode(), b"a.txt"):
        (tmp_path / os.fsdecode(name)).write_bytes(b"text")
    assert [os.fsencode(name) for name in names(tmp_path)] == [b"a.txt", "é.txt".encode(), b"\xff.txt"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("finewebb", "'finewebb' is neither a known corpus nor a path; did you mean fineweb?"),
        ("{tmp}/corpis", "neither a known corpus nor a path; did you mean {tmp}/corpus?"),
        ("{tmp}/zzz", "give one of fineweb, fineweb-edu, slimpajama, org/name of the Hub, or a path"),
        ("{tmp}/corpus", "holds no .txt, .jsonl or .parquet file (plain or .gz, .zst, .xz), only .md; give a file or a folder of these"),
        ("{tmp}/corpus/*.txt", "holds no .txt, .jsonl or .parquet file (plain or .gz, .zst, .xz); give a file or a folder of these"),
        ("{tmp}/corpus/notes.md", "is not a .txt, .jsonl or .parquet file (plain or .gz, .zst, .xz); give a file or a folder of these"),
        ("~nobody-of-that-name/x", "~nobody-of-that-name/x: there is no such user; write the whole path"),
        ("s4://bucket/x.txt", "s4://bucket/x.txt cannot be opened (Protocol not known: s4); use hf://, s3://, https:// or a path"),
    ],
)
def test_a_corpus_that_is_not_there_names_the_nearest(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "notes.md").write_text("# notes")
    with pytest.raises(UserError) as error:
        found(source.format(tmp=tmp_path))
    assert message.format(tmp=tmp_path) in str(error.value)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"s3://bucket/x: a package is missing that opens s3://; pip install s3fs$"):
        found("s3://bucket/x")


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("text")

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UserError, match=r"a\.txt: cannot be read \(Permission denied\); fix that"):
        found(tmp_path)


def test_the_id_tells_a_changed_corpus_and_not_where_it_lies(tmp_path: Path) -> None:
    def made(name: str, **files: str) -> dict[str, Any]:
        (tmp_path / name).mkdir()
        for stem, text in files.items():
            (tmp_path / name / f"{stem}.txt").write_text(text)
        return found(tmp_path / name).id

    long = "x" * 20_000
    first = made("one", a="text", b=long)
    assert first == made("two", a="text", b=long)
    assert json.loads(json.dumps(first)) == first
    others = [
        made("three", a="texT", b=long),
        made("four", a="text", c=long),
        made("five", a="text"),
        made("six", a="textx", b=long[1:]),
        made("seven", a="text", b=long[:-1] + "y"),
        found(tmp_path / "one", text_column="body").id,
    ]
    assert first not in others


@pytest.mark.parametrize(
    ("source", "repository", "subset"),
    [
        ("org/some-text", "org/some-text", None),
        ("org/t.ext_2:en", "org/t.ext_2", "en"),
        ("fineweb", "HuggingFaceFW/fineweb", "sample-10BT"),
        ("slimpajama", "cerebras/SlimPajama-627B", None),
    ],
)
def test_names_of_the_hub(source: str, repository: str, subset: str | None) -> None:
    hub = hub_corpus(source)
    assert hub is not None
    assert hub[:2] == (repository, subset)


def test_files_are_found_from_any_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    corpora = [found(source) for source in (".", "b", "b/*.txt", "a.txt")]
    monkeypatch.chdir("/")
    assert all(Path(file.url).read_text().endswith(file.name) for corpus in corpora for file in corpus.files)


def test_a_path_is_not_taken_for_a_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "text.txt").write_text("one")
    assert names("corpus/text.txt") == ["text.txt"]
    assert hub_corpus("./fineweb") is None and "fineweb" in HUB
    with pytest.raises(UserError, match=r"'corpus/texd\.txt' is neither a known corpus nor a path; did you mean corpus/text\.txt\?"):
        found("corpus/texd.txt")


@pytest.fixture
def memory() -> fsspec.AbstractFileSystem:
    """Files of fsspec's memory, which stand for those of any object store."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    for name in ("bucket/b/2.txt", "bucket/b/10.txt", "bucket/a.jsonl", "bucket/.hidden.txt", "bucket/x.csv"):
        fs.pipe(f"/{name}", b'{"text": "row"}')
    return fs


def test_any_file_system_is_listed_as_a_folder_a_pattern_or_a_file(memory: fsspec.AbstractFileSystem) -> None:
    assert names("memory://bucket") == names("memory://bucket/") == ["a.jsonl", "b/10.txt", "b/2.txt"]
    assert names("memory://bucket/**/*.txt") == ["b/10.txt", "b/2.txt"]
    assert names("memory://bucket/b") == names("memory://bucket/b/*.txt") == ["10.txt", "2.txt"]
    assert names("memory://bucket/a.jsonl") == ["a.jsonl"]
    assert read("memory://bucket/a.jsonl") == ["row"]
    assert all(fsspec.open(file.url).open().read() == b'{"text": "row"}' for file in found("memory://bucket").files)
    with pytest.raises(UserError, match=r"memory://bucket/c\.txt is not there"):
        found("memory://bucket/c.txt")
    with pytest.raises(UserError, match=r"memory://nowhere holds no \.txt"):
        found("memory://nowhere")


def test_the_id_of_files_behind_a_network_follows_their_sizes_and_versions(memory: fsspec.AbstractFileSystem) -> None:
    first = found("memory://bucket").id
    assert first == found("memory://bucket").id
    assert (first["files"], first["bytes"]) == (3, 45)
    memory.pipe("/bucket/a.jsonl", b'{"text": "rows"}')
    assert found("memory://bucket").id != first


WEB = {
    "calm": Fault("none"),
    "spoilt": Fault("drop"),
    "whole": Fault("none", ranged=False),
    "spoilt-whole": Fault("drop", times=2, ranged=False),
}


def test_an_address_of_the_web_is_read_in_ranges_or_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    for name in WEB:
        path = tmp_path / name / "text" / "1" / "a.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps({"text": f"{number} " * 50}) + "\n" for number in range(500)))
    with hub(tmp_path, {f"{name}/text": fault for name, fault in WEB.items()}) as server:
        addresses = [f"{server.endpoint}/web/{name}/text/a.jsonl" for name in WEB]
        ids = [found(address).id for address in addresses]
        documents = [read(f"{address}?key=1") for address in addresses]
        with pytest.raises(UserError, match=r"b\.jsonl is not there"):
            found(f"{server.endpoint}/web/calm/text/b.jsonl")
        assert {name.partition("/")[0] for name, count in server.failed.items() if count} == {"spoilt", "spoilt-whole"}
    assert documents == [[f"{number} " * 50 for number in range(500)]] * len(WEB)
    assert ids == [ids[0]] * len(WEB)


def test_a_server_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CONTACT_SECONDS", 0.1)
    with hub(tmp_path) as server:
        address = f"{server.endpoint}/web/a.jsonl"
    with pytest.raises(UserError, match=r"cannot be read \(.*[Cc]onnect.*\); check the address, your network and credentials$") as error:
        found(address)
    assert "\n" not in str(error.value)
