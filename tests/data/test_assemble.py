"""Shards come out the same for any engine and number of workers, and whatever is killed on the way."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from minifoundation.config import DataConfig
from minifoundation.data import assemble
from minifoundation.data.encode import Block, Encoding
from minifoundation.data.engines import Engine, Task, in_process, local
from minifoundation.data.pieces import Piece
from minifoundation.data.rows import all_documents
from minifoundation.data.shards import Shards, read_manifest
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.errors import UserError
from tests.data.prepared import files, prepared

pytestmark = pytest.mark.usefixtures("small_pieces")


class Shuffled:
    """An engine that does what it was given in a random order, and some of it never on the first try."""

    def __init__(self, seed: int, ahead: int) -> None:
        self.ahead = ahead
        self._random = random.Random(seed)
        self._engine = in_process()

    def submit(self, task: Task, pieces: Iterable[tuple[int, Piece]]) -> list[Future[None]]:
        given = list(pieces)
        order = self._random.sample(given, len(given))
        done = dict(zip((number for number, _ in order), self._engine.submit(task, order), strict=True))
        assert isinstance(task, Encoding)
        for number, _ in order:
            if self._random.random() < 0.2:
                task.path(number, self._random.randrange(3)).unlink(missing_ok=True)
        return [done[number] for number, _ in given]

    def close(self) -> None:
        pass


@pytest.fixture
def elsewhere(data: DataConfig, tmp_path: Path) -> Callable[[str], DataConfig]:
    return lambda name: data.model_copy(update={"shards_dir": tmp_path / name})


@pytest.mark.parametrize("seed", range(3))
def test_the_order_in_which_pieces_are_done_does_not_matter(
    data: DataConfig, tokenizer: Tokenizer, elsewhere: Callable[[str], DataConfig], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = files(prepared(data, tokenizer).folder)
    monkeypatch.setattr(assemble, "VISIBLE_SECONDS", 0)
    monkeypatch.setattr(assemble, "POLL_SECONDS", 0)
    shards = prepared(elsewhere("shuffled"), tokenizer, engine=Shuffled(seed, ahead=2 + 3 * seed))
    assert files(shards.folder) == expected
    assert not (shards.folder / ".work").exists()


@pytest.mark.parametrize("seed", range(3))
def test_stops_at_any_document_do_not_matter(
    data: DataConfig, tokenizer: Tokenizer, elsewhere: Callable[[str], DataConfig], seed: int
) -> None:
    """Blocks of any size, shards of any size, a stop at each shard."""
    rng = random.Random(seed)
    data = data.model_copy(update={"shard_tokens": rng.choice([1024, 1500, 3000]), "held_out_tokens": rng.choice([1024, 100_000])})
    expected = files(prepared(data, tokenizer).folder)
    stopped = elsewhere("stopped").model_copy(update={"shard_tokens": data.shard_tokens, "held_out_tokens": data.held_out_tokens})
    tokens = 1
    while not (shards := prepared(stopped, tokenizer, tokens)).complete:
        tokens = shards.train_tokens + rng.randint(1, 4000)
        if rng.random() < 0.3:
            shutil.rmtree(shards.folder / ".work")
    assert files(shards.folder) == expected


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_number_of_workers_does_not_matter(
    data: DataConfig, tokenizer: Tokenizer, elsewhere: Callable[[str], DataConfig], workers: int
) -> None:
    expected = files(prepared(data, tokenizer).folder)
    engine = local(workers)
    try:
        partly = prepared(elsewhere("local"), tokenizer, 6000, engine)
        assert not partly.complete
        assert files(prepared(elsewhere("local"), tokenizer, None, engine).folder) == expected
    finally:
        engine.close()


@pytest.mark.slow
def test_a_worker_that_is_killed_does_not_stop_the_run(
    data: DataConfig, tokenizer: Tokenizer, elsewhere: Callable[[str], DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = files(prepared(data, tokenizer).folder)
    killed: list[int] = []
    ready = assemble._ready

    def ready_after_a_kill(encoding: Encoding, work: assemble._InWork, *rest: Any) -> Block:
        if work.number in (1, 4) and work.number not in killed:
            for worker in engine._workers:  # type: ignore[attr-defined]
                worker.kill()
            killed.append(work.number)
        return ready(encoding, work, *rest)

    monkeypatch.setattr(assemble, "_ready", ready_after_a_kill)
    engine = local(2)
    try:
        assert files(prepared(elsewhere("killed"), tokenizer, None, engine).folder) == expected
    finally:
        engine.close()
    assert killed == [1, 4]


PROGRAM = """
import sys
from pathlib import Path
from minifoundation.config import DataConfig
from minifoundation.data import pieces, prepare
from minifoundation.data.engines import local
from minifoundation.data.tokenizer import Tokenizer
pieces.PIECE_BYTES, prepare.BLOCK_BYTES = 20_000, 6_000
data = DataConfig.model_validate_json(sys.argv[1])
engine = local(2)
prepare.prepare_shards(data.source, data, Tokenizer.load(Path(sys.argv[2])), tokens=None, engine=engine, show_progress=False)
engine.close()
"""


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_bytes(
    data: DataConfig, tokenizer: Tokenizer, elsewhere: Callable[[str], DataConfig]
) -> None:
    expected = files(prepared(data, tokenizer).folder)
    names = {name for name in expected if name.endswith(".bin")}
    again = elsewhere("killed")
    rng = random.Random(3)
    seen: set[str] = set()
    ends: list[int] = []
    for kill in [True] * 6 + [False]:
        before = len(seen)
        with subprocess.Popen([sys.executable, "-c", PROGRAM, again.model_dump_json(), str(tokenizer.path)]) as run:
            while kill and len(seen) - before < 3:  # of about forty blocks
                assert run.poll() is None
                seen |= {path.name for path in again.shards_dir.glob("*/.work/*.npz")}
            if kill:
                time.sleep(rng.uniform(0, 0.02))
                run.kill()
        ends.append(run.returncode)
        (folder,) = again.shards_dir.iterdir()
        Shards.open(folder)
        assert {path.name for path in folder.glob("*.bin")} <= names
    assert files(folder) == expected
    assert ends.count(-signal.SIGKILL) >= 2
    assert set(ends) == {0, -signal.SIGKILL}


def test_a_damaged_block_is_made_again(data: DataConfig, tokenizer: Tokenizer, elsewhere: Callable[[str], DataConfig]) -> None:
    expected = files(prepared(data, tokenizer).folder)
    partly = prepared(elsewhere("damaged"), tokenizer, 1)
    left = sorted((partly.folder / ".work").iterdir())
    assert left
    for path in left:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 255
        path.write_bytes(raw)
    assert files(prepared(elsewhere("damaged"), tokenizer).folder) == expected


class Idle:
    """An engine that says everything is done, and does nothing: as on a file system that its machines do not share."""

    ahead = 2

    def submit(self, task: Task, pieces: Iterable[tuple[int, Piece]]) -> list[Future[None]]:
        futures: list[Future[None]] = [Future() for _ in pieces]
        for future in futures:
            future.set_result(None)
        return futures

    def close(self) -> None:
        pass


def test_a_block_that_does_not_appear_is_one_line(data: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(assemble, "VISIBLE_SECONDS", 0.01)
    with pytest.raises(UserError, match=r"000000-0000.npz: is not there or damaged, though it was made 3 times; check the disk"):
        prepared(data, tokenizer, engine=Idle())


def test_a_file_that_breaks_off_keeps_the_shards_before_it(data: DataConfig, tokenizer: Tokenizer, corpus: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(corpus, own)
    (own / "b.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00 broken")
    data = data.model_copy(update={"source": str(own)})
    with pytest.raises(UserError, match=r"b.jsonl.gz: cannot be read to its end"):
        prepared(data, tokenizer)
    (folder,) = data.shards_dir.iterdir()
    assert Shards.open(folder).train_tokens >= 4096
    assert not list(folder.glob("*.part"))


def test_rows_that_are_no_document_are_counted_alike_for_any_cut(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assemble, "VISIBLE_SECONDS", 0)
    monkeypatch.setattr(assemble, "POLL_SECONDS", 0)
    rng = random.Random(1)
    bad = ['{"text": ""}', '{"text": null}', '{"txt": "a"}', "{", '{"text": 3}', '{"text": "\\u0000"}']
    lines = [rng.choice(bad) if rng.random() < 0.5 else json.dumps({"text": f"words {n} " * rng.randint(1, 30)}) for n in range(800)]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.jsonl").write_text("\n".join(lines))
    expected: Counter[str] = Counter()
    data = DataConfig(source=str(tmp_path / "c"), shard_tokens=16_384, held_out=0.1)
    documents = len(list(all_documents(str(tmp_path / "c"), data, expected)))
    engines: list[Engine] = [in_process(), Shuffled(1, 4), Shuffled(2, 9)]
    for number, engine in enumerate(engines):
        shards = prepared(data.model_copy(update={"shards_dir": tmp_path / str(number)}), tokenizer, None, engine)
        assert shards.manifest.skipped == expected
        assert shards.manifest.documents_read == documents
    assert len(expected) == 6


def test_a_corpus_of_bad_rows_alone_is_an_error_that_names_the_columns(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.jsonl").write_text('{"body": "a"}\n' * 5000)
    data = DataConfig(source=str(tmp_path / "c"), shards_dir=tmp_path / "s")
    with pytest.raises(UserError, match=r"c holds no document \(5,000 no column 'text'\); set data.text_column to one of: body"):
        prepared(data, tokenizer)
    (folder,) = data.shards_dir.iterdir()
    assert not list(folder.glob("*.bin"))
    assert not (manifest := read_manifest(folder)) or not manifest.complete
