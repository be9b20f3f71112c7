import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minifoundation.cli import main
from minifoundation.config import DataConfig, TokenizerConfig
from minifoundation.data import prepare
from minifoundation.data.prepare import is_held_out, prepare_shards, shards_folder, tokenizer_for
from minifoundation.data.shards import Shard, Shards, ShardWriter
from minifoundation.data.sources import documents
from minifoundation.data.tokenizer import BOS, EOS, Tokenizer, train_tokenizer
from minifoundation.errors import UserError

WORDS = ["the", "of", "and", "in", "that", "was", "his", "with", "for", "had", "you", "not", "her", "which", "have", "from", "but", "all"]
SMALL = TokenizerConfig(vocab_size=512)
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 documents, some of them twice, and three rows that are none."""
    rng = random.Random(7)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 200))) + f".\n\n\t{n}  ü ende\r\n" for n in range(480)]
    rows: list[Any] = [*texts, *texts[:20]]
    rows[100:100], rows[300:300], rows[500:500] = [None], [""], [None]
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    return folder


@pytest.fixture(scope="module")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer_for(SMALL, DataConfig(source=str(corpus)), tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def data(corpus: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(source=str(corpus), shards_dir=tmp_path / "shards", shard_tokens=4096, held_out=0.1)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "BATCH_BYTES", 10_000)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def texts_in(tokenizer: Tokenizer, shards: tuple[Shard, ...]) -> Iterator[str]:
    """Read documents back from their bos to their eos."""
    for shard in shards:
        ids = shard.tokens()
        assert ids[0] == BOS
        assert ids[-1] == EOS
        ends = np.flatnonzero(ids == EOS)
        for start, end in zip([0, *(ends[:-1] + 1)], ends, strict=True):
            assert ids[start] == BOS
            yield tokenizer.decode(ids[start + 1 : end].tolist())


def test_shards_hold_the_documents_exactly_and_in_order(data: DataConfig, tokenizer: Tokenizer) -> None:
    shards = prepare_shards(data, tokenizer, tokens=None, threads=2)
    texts = list(documents(data))
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
    for shard in prepare_shards(data, tokenizer, tokens=None, threads=1).train[:-1]:
        last_document = np.flatnonzero(shard.tokens() == BOS)[-1]
        assert last_document < data.shard_tokens <= shard.n_tokens


def test_the_bytes_do_not_depend_on_stops_requests_or_threads(data: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    at_once = files(prepare_shards(data, tokenizer, tokens=None, threads=2).folder)
    piecemeal = data.model_copy(update={"shards_dir": tmp_path / "piecemeal"})
    for tokens in (1, 6000, 6001, 10_000):
        shards = prepare_shards(piecemeal, tokenizer, tokens=tokens, threads=1)
        assert tokens <= shards.train_tokens < tokens + 2 * data.shard_tokens
        assert not shards.complete
        for name, content in files(shards.folder).items():
            assert name == "manifest.json" or content == at_once[name]
    shards = prepare_shards(piecemeal, tokenizer, tokens=None, threads=1)
    assert shards.complete
    assert files(shards.folder) == at_once


def test_what_is_there_is_not_made_again(data: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepare_shards(data, tokenizer, tokens=6000, threads=1)
    monkeypatch.setattr(prepare, "documents", lambda *_, **__: pytest.fail("the corpus is read again"))
    assert prepare_shards(data, tokenizer, tokens=6000, threads=1) == made
    assert prepare_shards(data, tokenizer, tokens=1, threads=1) == made


def test_held_out_documents_over_the_cap_are_dropped_and_never_trained_on(data: DataConfig, tokenizer: Tokenizer) -> None:
    capped = data.model_copy(update={"held_out_tokens": 1024})
    shards = prepare_shards(capped, tokenizer, tokens=None, threads=1)
    texts = list(documents(data))
    held_out = [text for text in texts if is_held_out(text.encode(), data.held_out)]
    kept = list(texts_in(tokenizer, shards.held_out))
    assert kept == held_out[: len(kept)]
    assert shards.manifest.held_out_dropped == len(held_out) - len(kept) > 0
    assert shards.held_out_tokens - len(tokenizer.encode(kept[-1])) - 2 < 1024 <= shards.held_out_tokens
    assert set(texts_in(tokenizer, shards.train)) == set(texts) - set(held_out)


def test_held_out_is_a_share_of_the_documents() -> None:
    texts = [f"document {n}".encode() for n in range(20_000)]
    for share in (0.0, 0.01, 0.5):
        found = [text for text in texts if is_held_out(text, share)]
        assert len(found) == pytest.approx(share * 20_000, rel=0.15)
    smaller = {text for text in texts if is_held_out(text, 0.01)}
    assert smaller < {text for text in texts if is_held_out(text, 0.02)}


def test_a_corpus_that_is_held_out_as_a_whole_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = next(f"text {n}" for n in range(100) if is_held_out(f"text {n}".encode(), 0.1))
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(UserError, match=r"data.held_out: all 1 documents fell into the held-out split; lower it"):
        prepare_shards(DataConfig(source=str(tmp_path), shards_dir=tmp_path / "s", held_out=0.1), tokenizer, tokens=None, threads=1)


@pytest.mark.parametrize("held_out", [0.0, 0.4])
def test_a_corpus_smaller_than_a_shard_is_one_shard(data: DataConfig, tokenizer: Tokenizer, held_out: float) -> None:
    large = data.model_copy(update={"shard_tokens": 10_000_000, "held_out": held_out})
    shards = prepare_shards(large, tokenizer, tokens=10, threads=1)
    assert shards.complete
    assert (len(shards.train), len(shards.held_out)) == (1, 1 if held_out else 0)


def change_text(corpus: Path) -> None:
    with (corpus / "a.jsonl").open("a") as stream:
        stream.write('\n{"text": "more"}')


@pytest.mark.parametrize(
    ("update", "change", "message"),
    [
        ({"shard_tokens": 2048}, None, "data.shard_tokens: 2048 here, but {folder} was made with 4096; set it to that, remove {folder}"),
        ({"held_out": 0.2}, None, "data.held_out: 0.2 here, but {folder} was made with 0.1; set it to that, remove {folder}"),
        ({"max_document_bytes": 300}, None, "data.max_document_bytes: 300 here, but {folder} was made with 4194304"),
        (
            {},
            change_text,
            "data.source: {corpus} has changed since {folder} was made from it; remove {folder}, or give another data.shards_dir",
        ),
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
    folder = prepare_shards(data, tokenizer, tokens=1, threads=1).folder
    before = files(folder)
    if change:
        change(own)
    for tokens in (1, None):
        with pytest.raises(UserError) as error:
            prepare_shards(data.model_copy(update=update), tokenizer, tokens=tokens, threads=1)
        assert message.format(folder=folder, corpus=own) in str(error.value)
    assert files(folder) == before


def test_another_tokenizer_or_column_has_a_folder_of_its_own(data: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = tokenizer_for(SMALL.model_copy(update={"vocab_size": 520}), data, tmp_path)
    column = data.model_copy(update={"text_column": "body"})
    assert len({shards_folder(data, tokenizer), shards_folder(data, other), shards_folder(column, tokenizer)}) == 3


def test_a_full_disk_leaves_nothing_half_written(data: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare_shards(data, tokenizer, tokens=1, threads=1)
    before = files(first.folder)
    add = ShardWriter.add
    written = 0

    def full_after_a_while(self: ShardWriter, ids: Any, text_bytes: int) -> None:
        nonlocal written
        written += 1
        if written > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, ids, text_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add", full_after_a_while)
        with pytest.raises(OSError, match="No space left") as error:
            prepare_shards(data, tokenizer, tokens=None, threads=1)
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(first.folder)
    assert files(first.folder) == before
    assert prepare_shards(data, tokenizer, tokens=None, threads=1).complete


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
    folder = prepare_shards(data, tokenizer, tokens=1, threads=1).folder
    (folder / "train-00001.bin.part").write_bytes(b"half")
    (folder / "train-00001.bin").write_bytes(b"whole, but not yet in the manifest")
    shards = prepare_shards(data, tokenizer, tokens=None, threads=1)
    assert not list(folder.glob("*.part"))
    assert Shards.open(folder) == shards
    assert len(list(texts_in(tokenizer, shards.train))) == sum(shard.documents for shard in shards.train)


def test_two_processes_do_not_write_one_folder(data: DataConfig, tokenizer: Tokenizer) -> None:
    shards = prepare_shards(data, tokenizer, tokens=1, threads=1)
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    lock = shards.folder / ".lock"
    with subprocess.Popen([sys.executable, "-c", hold, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"is being written by another process \(pid {os.getpid()}\); wait until it is done"):
            prepare_shards(data, tokenizer, tokens=None, threads=1)
        assert prepare_shards(data, tokenizer, tokens=1, threads=1) == shards
        other.communicate()
    assert prepare_shards(data, tokenizer, tokens=None, threads=1).complete


def test_a_tokenizer_is_made_once_and_then_reused(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataConfig(source=str(corpus), held_out=0.1)
    seen: list[str] = []

    def watched(texts: Iterator[str], config: TokenizerConfig, out: Path) -> Tokenizer:
        seen.extend(texts)
        return train_tokenizer(seen, config, out)

    monkeypatch.setattr(prepare, "train_tokenizer", watched)
    made = tokenizer_for(SMALL, data, tmp_path)
    assert made.path == tmp_path / "tokenizer.model"
    assert seen == [text for text in documents(data) if not is_held_out(text.encode(), 0.1)]
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


def test_the_command_reads_the_settings_of_a_whole_run(corpus: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"out_dir: x\nmodel: {{d_model: 64}}\ntrain: {{tokens: 5}}\ntokenizer: {{vocab_size: 512}}\n"
        f"data: {{source: {corpus}, shards_dir: {tmp_path / 'shards'}, held_out: 0.1, shard_tokens: 4096}}\n"
    )
    line = ["prepare", "--config", str(path), "--tokens", "6_000", "--tokenizer_out", str(tmp_path / "tokenizer")]
    assert main(line) == 0
    out = capsys.readouterr().out
    (folder,) = (tmp_path / "shards").iterdir()
    shards = Shards.open(folder)
    assert f"{folder}: 2 shards, more can follow" in out
    assert f"train      {shards.train_tokens:,} tokens in" in out
    assert "skipped    1 null" in out or "skipped    no rows" in out
    assert main(["prepare", "--data", str(corpus), "--data.shard_tokns", "3"]) == 2
    assert "did you mean --data.shard_tokens?" in capsys.readouterr().err
    path.write_text(f"dta: {{}}\ndata: {{source: {corpus}}}\n")
    assert main(line) == 2
    assert f"dta: unknown setting (in {path}, command line)" in capsys.readouterr().err


def test_a_stop_by_hand_says_how_to_go_on(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def stopped(*_: Any, **__: Any) -> Shards:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "prepare_shards", stopped)
    line = ["prepare", "--data", str(corpus), "--tokenizer.vocab_size", "512", "--tokenizer_out", str(tmp_path)]
    assert main(line) == 130
    assert capsys.readouterr().err.endswith("stopped; complete shards are kept, and the same line goes on after them\n")


@pytest.fixture
def hub_without_data_sets() -> Iterator[str]:
    class NotFound(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), NotFound)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def prepared_from_hub(name: str, endpoint: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run the command for real in a process of its own: the hub's library reads its address when it is imported."""
    return subprocess.run(
        [sys.executable, "-c", "import sys; from minifoundation.cli import main; sys.exit(main(sys.argv[1:]))", "prepare", "--data", name],
        env={**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_hub_name_without_a_network_is_one_line(tmp_path: Path) -> None:
    done = prepared_from_hub("fineweb", "http://127.0.0.1:9", tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    problem, _, remedy = done.stderr.rpartition("; ")
    assert problem.startswith("error: data.source: fineweb (HuggingFaceFW/fineweb on the Hugging Face Hub) cannot be reached: ")
    assert problem.endswith("Connection refused")
    assert remedy == "connect to the network, or give --data a path\n"


def test_a_data_set_that_left_the_hub_names_another(hub_without_data_sets: str, tmp_path: Path) -> None:
    done = prepared_from_hub("slimpajama", hub_without_data_sets, tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "error: data.source: slimpajama (cerebras/SlimPajama-627B on the Hugging Face Hub) is not there; "
        "use fineweb-edu, or download a copy such as DKYoon/SlimPajama-6B and give --data its folder\n"
    )
