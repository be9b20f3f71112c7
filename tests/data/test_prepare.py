import errno
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minifoundation.config import DataConfig, QualityFilter, TokenizerConfig
from minifoundation.data import encode, prepare
from minifoundation.data.encode import is_held_out
from minifoundation.data.engines import in_process
from minifoundation.data.prepare import rebuilt_files, refuse_unusable, shards_folder, tokenizer_for
from minifoundation.data.rows import Bad, documents
from minifoundation.data.shards import Shards, ShardWriter, read_manifest
from minifoundation.data.sources import Corpus, File
from minifoundation.data.tokenizer import BOS, EOS, Tokenizer, train_tokenizer
from minifoundation.errors import UserError
from minifoundation.wording import counted
from tests.data.prepared import all_texts, files, prepared, texts_in

pytestmark = pytest.mark.usefixtures("small_pieces")

SMALL = TokenizerConfig(vocab_size=512)


def test_shards_hold_the_documents_exactly_and_in_order(data: DataConfig, tokenizer: Tokenizer) -> None:
    shards = prepared(data, tokenizer)
    texts = all_texts(data)
    assert len(texts) == 500
    held_out = [is_held_out(text.encode(), data.held_out) for text in texts]
    train = [text for text, held in zip(texts, held_out, strict=True) if not held]
    kept = [text for text, held in zip(texts, held_out, strict=True) if held]
    assert 20 < len(kept) < 90
    assert list(texts_in(tokenizer, shards.train)) == train
    assert list(texts_in(tokenizer, shards.held_out)) == kept
    assert set(kept).isdisjoint(train)

    ids = np.concatenate([shard.tokens() for shard in shards.train]).tolist()
    assert ids == [token for text in train for token in [BOS, *tokenizer.encode(text), EOS]]
    assert all(shard.n_tokens >= 4096 for shard in shards.train[:-1])
    assert all(shard.n_tokens - len(tokenizer.encode(train[-1])) < 8192 for shard in shards.train)
    assert len(shards.train) > 3

    manifest = shards.manifest
    assert manifest.complete
    assert manifest.documents_read == 500
    assert manifest.skipped == {"null": 2, "empty": 1}
    assert manifest.dtype == "uint16"
    assert sum(shard.documents for shard in shards.train) == len(train)
    assert shards.bytes_per_token == pytest.approx(sum(len(text.encode()) for text in kept) / shards.held_out_tokens)


def test_a_shard_ends_with_the_document_that_fills_it(data: DataConfig, tokenizer: Tokenizer) -> None:
    for shard in prepared(data, tokenizer).train[:-1]:
        last_document = np.flatnonzero(shard.tokens() == BOS)[-1]
        assert last_document < data.shard_tokens <= shard.n_tokens


def test_the_bytes_do_not_depend_on_stops_or_requests(data: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    at_once = files(prepared(data, tokenizer).folder)
    piecemeal = data.model_copy(update={"shards_dir": tmp_path / "piecemeal"})
    for tokens in (1, 6000, 6001, 10_000):
        shards = prepared(piecemeal, tokenizer, tokens)
        assert tokens <= shards.train_tokens < tokens + 2 * data.shard_tokens
        assert not shards.complete
        for name, content in files(shards.folder).items():
            assert name == "manifest.json" or content == at_once[name]
    shards = prepared(piecemeal, tokenizer)
    assert shards.complete
    assert files(shards.folder) == at_once


def test_what_is_there_is_not_made_again(data: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepared(data, tokenizer, 6000)
    monkeypatch.setattr(prepare, "pieces", lambda *_, **__: pytest.fail("the corpus is read again"))
    assert prepared(data, tokenizer, 6000) == made
    assert prepared(data, tokenizer, 1) == made


def test_held_out_documents_over_the_cap_are_dropped_and_never_trained_on(data: DataConfig, tokenizer: Tokenizer) -> None:
    capped = data.model_copy(update={"held_out_tokens": 1024})
    shards = prepared(capped, tokenizer)
    texts = all_texts(data)
    held_out = [text for text in texts if is_held_out(text.encode(), data.held_out)]
    kept = list(texts_in(tokenizer, shards.held_out))
    assert kept == held_out[: len(kept)]
    assert shards.manifest.held_out_dropped == len(held_out) - len(kept) > 0
    assert shards.held_out_tokens - len(tokenizer.encode(kept[-1])) - 2 < 1024 <= shards.held_out_tokens
    assert set(texts_in(tokenizer, shards.train)) == set(texts) - set(held_out)


def test_two_that_want_a_tokenizer_in_one_place_train_one(data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each would make shards with its own, and the file would be that of the last, or a mixture."""
    trained = []

    def slowly(*arguments: Any) -> Tokenizer:
        trained.append(arguments)
        time.sleep(0.5)
        return train_tokenizer(*arguments)

    monkeypatch.setattr(prepare, "train_tokenizer", slowly)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: tokenizer_for(SMALL, data, tmp_path / "new" / "tokenizer"), range(2)))
    assert len({one.sha256 for one in found}) == len(trained) == 1


def test_a_corpus_that_is_not_there_leaves_no_folder(tmp_path: Path) -> None:
    data = DataConfig(source=str(tmp_path / "nowhere"), shards_dir=tmp_path / "shards")
    with pytest.raises(UserError, match="nowhere"):
        tokenizer_for(TokenizerConfig(), data, tmp_path / "new" / "tokenizer")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_is_trained_on_what_is_trained_on(data: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out documents are told by their text as a filter leaves it."""

    def last_word_off(text: str) -> str | Bad:
        return text.rpartition(" ")[0] or Bad("one word")

    monkeypatch.setattr("minifoundation.data.filters.quality_filter", lambda _: last_word_off)
    cases: tuple[tuple[QualityFilter, ...], ...] = ((), ("c4",))
    for filters in cases:
        config = data.model_copy(update={"filters": filters, "shards_dir": data.shards_dir / str(len(filters))})
        seen = list(prepare._sample(str(config.source), config, 10**9))
        assert seen == list(texts_in(tokenizer, prepared(config, tokenizer).train)) and len(seen) > 300


def test_a_corpus_that_is_held_out_as_a_whole_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = next(f"text {n}" for n in range(100) if is_held_out(f"text {n}".encode(), 0.1))
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError, match=rf"data.held_out: every document fell into the held-out split; lower it, and remove {tmp_path}/s/"):
        prepared(DataConfig(source=str(tmp_path), shards_dir=tmp_path / "s", held_out=0.1), tokenizer)


@pytest.mark.parametrize("held_out", [0.0, 0.4])
def test_a_corpus_smaller_than_a_shard_is_one_shard(data: DataConfig, tokenizer: Tokenizer, held_out: float) -> None:
    large = data.model_copy(update={"shard_tokens": 10_000_000, "held_out": held_out})
    shards = prepared(large, tokenizer, 10)
    assert shards.complete
    assert (len(shards.train), len(shards.held_out)) == (1, 1 if held_out else 0)


def test_a_file_url_is_the_path(data: DataConfig, corpus: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Its folder is that of the path, and a change of the text is seen although there are enough shards."""
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    url = f"file://{copy}"
    made = prepared(data.model_copy(update={"source": url}), tokenizer, 6000)
    assert made.folder == shards_folder(str(copy), data, tokenizer)
    change_text(copy)
    with pytest.raises(UserError, match=f"data.source: {url} has changed since"):
        prepared(data.model_copy(update={"source": url}), tokenizer, 6000)


def change_text(corpus: Path) -> None:
    with (corpus / "a.jsonl").open("a") as stream:
        stream.write('\n{"text": "more"}')


def same_size(corpus: Path) -> None:
    content = bytearray((corpus / "a.jsonl").read_bytes())
    content[20] ^= 1
    (corpus / "a.jsonl").write_bytes(content)


def in_words(corpus: Path) -> str:
    there = [path for path in (*corpus.iterdir(), *corpus.glob("linked/*")) if path.is_file()]
    return f"{counted(len(there), 'file')} of {sum(path.stat().st_size for path in there):,} bytes"


def linked_file(corpus: Path) -> None:
    elsewhere = corpus.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "more.txt").write_text("more")
    (corpus / "linked").symlink_to(elsewhere)


@pytest.mark.parametrize(
    ("update", "change", "message"),
    [
        ({"shard_tokens": 2048}, None, "data.shard_tokens: 2048 here, but {folder} was made with 4096; set it to that, remove {folder}"),
        ({"held_out": 0.2}, None, "data.held_out: 0.2 here, but {folder} was made with 0.1; set it to that, remove {folder}"),
        ({"max_document_bytes": 300}, None, "data.max_document_bytes: 300 here, but {folder} was made with 4194304"),
        (
            {},
            change_text,
            "data.source: {corpus} has changed since {folder} was made from it "
            "({then} then, {now} now); remove {folder}, or give another data.shards_dir",
        ),
        ({}, same_size, "data.source: {corpus} has changed since {folder} was made from it; remove {folder}"),
        ({}, linked_file, "has changed since {folder} was made from it ({then} then, {now} now); remove"),
        ({"filters": ("c4", "fineweb")}, None, "data.filters: c4,fineweb here, but {folder} was made with none; set it to that"),
    ],
)
def test_a_changed_corpus_or_setting_is_refused(
    data: DataConfig,
    corpus: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    update: dict[str, Any],
    change: Callable[[Path], None] | None,
    message: str,
) -> None:
    own = tmp_path / "own"
    shutil.copytree(corpus, own)
    data = data.model_copy(update={"source": str(own)})
    folder = prepared(data, tokenizer, 1).folder
    before = files(folder)
    then = in_words(own)
    if change:
        change(own)
    for tokens in (1, None):
        with pytest.raises(UserError) as error:
            prepared(data.model_copy(update=update), tokenizer, tokens)
        assert message.format(folder=folder, corpus=own, then=then, now=in_words(own)) in str(error.value)
    assert files(folder) == before


@pytest.mark.parametrize("pattern", ["", "*.jsonl"])
def test_shards_that_suffice_do_without_the_text(
    pattern: str, data: DataConfig, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(corpus, own)
    data = data.model_copy(update={"source": str(own / pattern)})
    some = prepared(data, tokenizer, 1)
    shutil.rmtree(own)
    refuse_unusable(data, tokenizer)
    assert prepared(data, tokenizer, 1) == some and not some.complete
    with pytest.raises(
        UserError, match=f"is no longer there, and is needed for other shards than those of {some.train_tokens:,} tokens in"
    ):
        prepared(data, tokenizer)
    with pytest.raises(UserError, match=r"is neither a known corpus nor a path|holds no"):
        refuse_unusable(data, None)
    own.mkdir()
    assert prepared(data, tokenizer, 1) == some
    (own / "other.jsonl").write_text('{"text": "and now it has changed"}')
    with pytest.raises(UserError, match="has changed since"):
        prepared(data, tokenizer, 1)


def test_a_name_that_means_nothing_leaves_no_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is neither a known corpus nor a path"):
        prepared(DataConfig(source=str(tmp_path / "nothing"), shards_dir=tmp_path / "shards"), tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_or_column_has_a_folder_of_its_own(data: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = tokenizer_for(SMALL.model_copy(update={"vocab_size": 520}), data, tmp_path)
    column = data.model_copy(update={"text_column": "body"})
    source = str(data.source)
    assert len({shards_folder(source, data, tokenizer), shards_folder(source, data, other), shards_folder(source, column, tokenizer)}) == 3


def test_a_full_disk_leaves_nothing_half_written(data: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepared(data, tokenizer, 1)
    before = files(first.folder)
    add = ShardWriter.add
    written = 0

    def full_after_a_while(self: ShardWriter, ids: Any, text_bytes: int, documents: int = 1) -> None:
        nonlocal written
        written += 1
        if written > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, ids, text_bytes, documents)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", full_after_a_while)
        with pytest.raises(OSError, match="No space left") as error:
            prepared(data, tokenizer)
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(first.folder)
    assert files(first.folder) == before
    assert prepared(data, tokenizer).complete


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_disk_that_is_full_when_a_shard_is_closed_leaves_nothing_either(tmp_path: Path) -> None:
    (tmp_path / "train-00000.bin.part").symlink_to("/dev/full")
    writer = ShardWriter(tmp_path / "train-00000.bin", "uint16")
    writer.add(np.arange(100), 100)
    with pytest.raises(OSError, match="No space left"):
        writer.finish()
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(data: DataConfig, tokenizer: Tokenizer) -> None:
    folder = prepared(data, tokenizer, 1).folder
    (folder / "train-00001.bin.part").write_bytes(b"half")
    (folder / "train-00001.bin").write_bytes(b"whole, but not yet in the manifest")
    shards = prepared(data, tokenizer)
    assert not list(folder.glob("*.part"))
    assert Shards.open(folder) == shards
    assert len(list(texts_in(tokenizer, shards.train))) == sum(shard.documents for shard in shards.train)


def test_two_processes_do_not_write_one_folder(data: DataConfig, tokenizer: Tokenizer) -> None:
    shards = prepared(data, tokenizer, 1)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    lock = shards.folder / ".lock"
    with subprocess.Popen([sys.executable, "-c", hold, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        written_by = rf"is being written by another process \(pid {os.getpid()} on {re.escape(socket.gethostname())}\)"
        with pytest.raises(UserError, match=f"{written_by}; wait until it is done"):
            prepared(data, tokenizer)
        assert prepared(data, tokenizer, 1) == shards
        other.communicate()
    assert prepared(data, tokenizer).complete


def test_a_process_that_waits_for_the_lock_takes_what_the_other_made(
    data: DataConfig, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minifoundation.lock.POLL_SECONDS", 0.01)
    finished = prepared(data.model_copy(update={"shards_dir": tmp_path / "finished"}), tokenizer)
    folder = shards_folder(str(data.source), data, tokenizer)
    folder.mkdir(parents=True)
    waiting: list[Shards] = []
    waits = threading.Thread(target=lambda: waiting.append(prepared(data, tokenizer, 6000, wait_for_lock=True)))
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waits.start()
        waits.join(0.3)
        assert waits.is_alive()
        for path in finished.folder.glob("*.bin"):
            shutil.copy(path, folder)
        shutil.copy(finished.folder / "manifest.json", folder / "manifest.part")
        (folder / "manifest.part").replace(folder / "manifest.json")
        waits.join(10)
        assert not waits.is_alive()
    assert waiting[0].manifest == finished.manifest

    shutil.rmtree(folder)
    folder.mkdir()
    waits = threading.Thread(target=lambda: waiting.append(prepared(data, tokenizer, 6000, wait_for_lock=True)))
    with (folder / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waits.start()
        waits.join(0.3)
        assert waits.is_alive()
    waits.join(10)  # the other ended without having made it
    assert not waits.is_alive()
    assert 6000 <= waiting[1].train_tokens < finished.train_tokens


def test_settings_may_change_until_there_is_a_shard(data: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            prepared(data, tokenizer)
    (folder,) = data.shards_dir.iterdir()
    begun = read_manifest(folder)
    assert begun is not None and begun.settings["held_out"] == 0.1
    assert list((folder / ".work").iterdir())
    shards = prepared(data.model_copy(update={"held_out": 0.0}), tokenizer)
    assert shards.manifest.settings["held_out"] == 0.0
    assert shards.held_out_tokens == 0


def test_each_shard_can_be_made_again_alone(data: DataConfig, tokenizer: Tokenizer) -> None:
    data = data.model_copy(update={"held_out_tokens": 2000})
    shards = prepared(data, tokenizer)
    source = str(data.source)
    before = files(shards.folder)
    assert rebuilt_files(source, data, tokenizer) == []
    names = [name for name in before if name.endswith(".bin")]
    assert len(names) > 6
    for name in names:
        path = shards.folder / name
        if name.endswith("1.bin"):
            path.unlink()
        else:
            path.write_bytes(before[name][:-2] + b"\0\0")
        assert rebuilt_files(source, data, tokenizer, engine=in_process()) == [path]
        assert files(shards.folder) == before
    for name in names:
        (shards.folder / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"has 0 bytes instead of .*; make it again: minifoundation prepare --rebuild"):
        prepared(data, tokenizer)
    assert sorted(path.name for path in rebuilt_files(source, data, tokenizer, engine=in_process())) == sorted(names)
    assert files(shards.folder) == before
    assert [path.name for path in shards.folder.iterdir() if path.is_dir()] == []


def test_a_shard_is_not_made_again_from_another_corpus(data: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(data.source)
    with pytest.raises(UserError, match="holds no token shards"):
        rebuilt_files(source, data, tokenizer)
    folder = prepared(data, tokenizer).folder
    (folder / "train-00001.bin").unlink()
    with monkeypatch.context() as patch:  # a change that the hash over names, sizes and ends of files does not see
        patch.setattr(encode, "documents", lambda *arguments: (text.upper() for text in documents(*arguments)))
        with pytest.raises(UserError, match=f"data.source: {source} has changed since {folder} was made from it; remove"):
            rebuilt_files(source, data, tokenizer, engine=in_process())
    assert not (folder / "train-00001.bin").exists()
    assert not list(folder.glob(".rebuild*"))
    corpus = Path(source).rename(f"{source} elsewhere")
    with pytest.raises(
        UserError, match=f"{source} is no longer there, and damaged shards in {folder} are to be made of it again; put it back"
    ):
        rebuilt_files(source, data, tokenizer)
    corpus.rename(source)
    (folder / ".rebuild-killed").mkdir()
    assert len(rebuilt_files(source, data, tokenizer)) == 1
    assert not list(folder.glob(".rebuild*"))


def test_documents_that_filters_drop_are_counted_and_duplicates_left_out(data: DataConfig, tokenizer: Tokenizer) -> None:
    pytest.importorskip("datatrove")
    texts = all_texts(data)
    deduplicated = data.model_copy(update={"dedup": "exact"})
    shards = prepared(deduplicated, tokenizer)
    kept = [*texts_in(tokenizer, shards.train), *texts_in(tokenizer, shards.held_out)]
    assert sorted(kept) == sorted(set(texts))
    assert shards.manifest.skipped == {"null": 2, "empty": 1, "duplicate": 20}
    with pytest.raises(UserError, match=r"data.dedup: none here, but .* was made with exact; set it to that"):
        prepared(data, tokenizer)
    (shards.folder / "train-00001.bin").unlink()
    assert len(rebuilt_files(str(data.source), deduplicated, tokenizer)) == 1


def test_duplicates_are_not_sought_behind_a_network(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = Corpus("s3://bucket/a", (File("s3://bucket/a/b.jsonl", "b.jsonl", 10),), {})
    monkeypatch.setattr(prepare, "find_corpus", lambda *_, **__: remote)
    data = DataConfig(source="s3://bucket/a", dedup="exact", shards_dir=tmp_path)
    with pytest.raises(UserError, match=r"data.dedup: exact reads the whole corpus beforehand, and s3://bucket/a is read over the network"):
        prepared(data, tokenizer)


def test_the_tokenizer_of_a_mixture_sees_each_source_by_its_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_text("\n".join(json.dumps({"text": name * 99}) for _ in range(1000)))
    seen: list[str] = []
    monkeypatch.setattr(prepare, "train_tokenizer", lambda texts, *_: seen.extend(texts))
    mix: dict[str, float] = {str(tmp_path / "a"): 3, str(tmp_path / "b"): 1, str(tmp_path / "c"): 1}
    tokenizer_for(TokenizerConfig(vocab_size=512, sample_bytes=50_000), DataConfig(mix=mix, held_out=0), tmp_path / "out")
    letters = Counter("".join(seen))
    assert letters == {"a": 30_000, "b": 10_000, "c": 10_000}


def test_short_lines_of_one_source_take_no_share_of_another(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "ab cd ef"}) for _ in range(10_000)))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": "где это"}) for _ in range(10_000)))
    mix = {str(tmp_path / "a.jsonl"): 0.95, str(tmp_path / "b.jsonl"): 0.05}
    made = tokenizer_for(TokenizerConfig(vocab_size=512, sample_bytes=20_000), DataConfig(mix=mix, held_out=0), tmp_path / "out")
    assert "это".encode()[:2] in made.surfaces


def test_a_tokenizer_is_made_once_and_then_reused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataConfig(source=str(corpus), held_out=0.1)
    seen: list[str] = []

    def watched(texts: Iterator[str], config: TokenizerConfig, out: Path) -> Tokenizer:
        seen.extend(texts)
        return train_tokenizer(seen, config, out)

    monkeypatch.setattr(prepare, "train_tokenizer", watched)
    made = tokenizer_for(SMALL, data, tmp_path)
    assert made.path == tmp_path / "tokenizer.model"
    assert seen == [text for text in all_texts(data) if not is_held_out(text.encode(), 0.1)]
    monkeypatch.setattr(prepare, "train_tokenizer", lambda *_: pytest.fail("trained again"))
    assert tokenizer_for(SMALL, data, tmp_path).sha256 == made.sha256
    with pytest.raises(UserError, match=r"tokenizer: bpe of 512 pieces asked for, but .* is unigram of"):
        tokenizer_for(SMALL.model_copy(update={"kind": "bpe"}), data, tmp_path)


def test_a_given_tokenizer_is_copied_and_no_other_taken_for_it(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = DataConfig(source=str(corpus))
    given = SMALL.model_copy(update={"path": tokenizer.path})
    copied = tokenizer_for(given, data, tmp_path / "run")
    assert copied.path.read_bytes() == tokenizer.path.read_bytes()
    assert tokenizer_for(given, data, tmp_path / "run").sha256 == tokenizer.sha256
    other = tokenizer_for(SMALL.model_copy(update={"kind": "bpe"}), data, tmp_path / "other")
    with pytest.raises(UserError, match=r"tokenizer.path: .* is not the tokenizer that is already in"):
        tokenizer_for(given.model_copy(update={"path": other.path}), data, tmp_path / "run")
