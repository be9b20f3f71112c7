from __future__ import annotations

import json
from pathlib import Path

import pytest

from minifoundation.errors import UserError
from minifoundation.evaluate import mirror
from tests.evaluate.tiny import write_items


@pytest.fixture
def made(tmp_path: Path) -> Path:
    for split in ("train", "test"):
        write_items(tmp_path / "org/name/default", split, [{"text": split}])
    return tmp_path


def test_a_whole_mirror_is_as_its_manifest_says(made: Path) -> None:
    assert mirror.read_manifest(made) is None
    assert mirror.seal(made) == 2
    hashes = mirror.read_manifest(made)
    assert hashes is not None and sorted(hashes) == ["org/name/default/test.jsonl", "org/name/default/train.jsonl"]
    assert mirror.faults(made, hashes) == []
    assert mirror.read_dataset(made, "org/name", None)["test"]["text"][:] == ["test"]


def test_a_text_may_hold_any_character(tmp_path: Path) -> None:
    texts = [f"one{character}two" for character in "\n\r\x0b\x0c\x1c\x85\u2028\u2029"]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    assert mirror.read_file(tmp_path / "test.jsonl")["text"][:] == texts


def test_what_is_pulled_besides_does_not_make_a_damaged_file_right(made: Path) -> None:
    mirror.seal(made)
    write_items(made / "org/name/default", "test", [{"text": "damaged"}])
    write_items(made / "org/other/default", "test", [{"text": "pulled"}])
    assert mirror.seal(made, [made / "org/other/default/test.jsonl"]) == 3
    assert mirror.faults(made, mirror.read_manifest(made) or {}) == ["org/name/default/test.jsonl: changed"]
    (made / "manifest.json").unlink()
    assert mirror.seal(made, [made / "org/other/default/test.jsonl"]) == 3
    assert mirror.faults(made, mirror.read_manifest(made) or {}) == [], "without a manifest all is taken as it lies there"


def test_a_changed_file_a_missing_and_a_foreign_one_are_named(made: Path) -> None:
    mirror.seal(made)
    write_items(made / "org/name/default", "test", [{"text": "edited"}])
    (made / "org/name/default/train.jsonl").unlink()
    write_items(made / "org/other/default", "test", [{"text": "new"}])
    folder = "org/name/default"
    assert mirror.faults(made, mirror.read_manifest(made) or {}) == [
        f"{folder}/train.jsonl: missing",
        f"{folder}/test.jsonl: changed",
        "org/other/default/test.jsonl: not in the manifest",
    ]
    with pytest.raises(UserError, match=r"test\.jsonl: has changed since the mirror's manifest was written; pull it again"):
        mirror.read_dataset(made, "org/name", None)
    with pytest.raises(UserError, match=r"test\.jsonl: is not in the mirror's manifest"):
        mirror.read_dataset(made, "org/other", None)


def test_the_fingerprint_is_that_of_the_content(made: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    before = mirror.fingerprint(made)
    mirror.seal(made)
    (made / "README.md").write_text("notes")
    assert mirror.fingerprint(made) == before
    write_items(made / "org/name/default", "test", [{"text": "edited"}])
    assert mirror.fingerprint(made) != before and mirror.fingerprint(None) is None


@pytest.mark.parametrize(
    ("suffix", "content"),
    [("parquet", b"PAR1 no"), ("jsonl", b'{"text": \n'), ("jsonl", b"[1]\n"), ("jsonl", b'{"text": "a"}\n{"text": 3}\n')],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, suffix: str, content: bytes) -> None:
    folder = tmp_path / "org/name/default"
    folder.mkdir(parents=True)
    (folder / f"test.{suffix}").write_bytes(content)
    with pytest.raises(UserError, match=rf"test\.{suffix}: cannot be read \("):
        mirror.read_dataset(tmp_path, "org/name", None)


def test_a_damaged_manifest_is_named(made: Path) -> None:
    (made / "manifest.json").write_text('{"sha256": {')
    with pytest.raises(UserError, match=r"manifest\.json: is damaged: not JSON; write it again with eval-data check --seal"):
        mirror.read_dataset(made, "org/name", None)
    mirror.seal(made)
    mirror.read_dataset(made, "org/name", None)


def test_a_folder_without_data_is_not_sealed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no data \(\.parquet, \.jsonl\); give the folder of a mirror"):
        mirror.seal(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["{}", '{"format": 4, "step": 10, "files": {}}', '{"source": {"sha256": "ab"}}'])
def test_the_manifest_of_something_else_is_never_written_over(made: Path, content: str) -> None:
    """Token shards and checkpoints have one of the same name, and are lost without it."""
    (made / "manifest.json").write_text(content)
    for call in (mirror.read_manifest, mirror.seal):
        with pytest.raises(UserError, match=r"manifest\.json: is not a manifest of a mirror; give the folder of a mirror"):
            call(made)
    assert (made / "manifest.json").read_text() == content
