"""Shards made in the background: all that is wanted, whatever happens to the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minifoundation.config import DataConfig, TokenizerConfig
from minifoundation.data.prepare import prepare_shards, shards_folder, tokenizer_for
from minifoundation.data.samples import samples_from
from minifoundation.data.shards import Shards
from minifoundation.data.supply import FIRST_ROUND, Supply, Want, prepared, rounds
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.errors import UserError

VERSE = Path(__file__).parents[2] / "examples" / "shakespeare.txt"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "verse.txt").write_bytes(VERSE.read_bytes()[:60_000])
    return tokenizer_for(TokenizerConfig(vocab_size=512), DataConfig(source=str(folder / "verse.txt")), folder)


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Two sources, of 60 and 30 kB, in shards of 4096 tokens."""
    for name, size in (("a", 60_000), ("b", 30_000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "verse.txt").write_bytes(VERSE.read_bytes()[:size])
    mix = {str(tmp_path / "a"): 0.5, str(tmp_path / "b"): 0.5}
    return DataConfig(mix=mix, shards_dir=tmp_path / "shards", shard_tokens=4096, max_document_bytes=512, held_out=0.1)


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=5))
def test_no_source_of_a_mixture_is_far_behind_and_all_are_made_in_the_end(samples: list[int]) -> None:
    wants = [Want(str(number), 0, n, 8) for number, n in enumerate(samples)]
    parts = dict.fromkeys(wants, 1.0 / FIRST_ROUND)
    for turn, (want, enough) in enumerate(rounds(wants)):
        assert want == wants[turn % len(wants)]
        parts[want] = enough / want.samples
        # rounding up to whole samples matters where few are wanted
        assert len(wants) == 1 or all(part <= 2 * min(parts.values()) + 1 / one.samples for one, part in parts.items())
    assert set(parts.values()) == {1.0}


@pytest.mark.parametrize(("first_shard", "samples", "seq_len"), [(0, 1, 32), (0, 300, 32), (2, 300, 32), (3, 7, 1500), (0, 10**6, 32)])
def test_what_is_wanted_is_made_and_no_shard_more(
    data: DataConfig, tokenizer: Tokenizer, first_shard: int, samples: int, seq_len: int
) -> None:
    source = next(iter(data.weights))
    shards = prepared(Want(source, first_shard, samples, seq_len), 10**9, data, tokenizer)
    there = samples_from(shards, first_shard, seq_len)
    assert shards.complete or there >= samples
    last = (shards.train[-1].n_tokens - 1) // seq_len
    assert shards.complete or there - last < samples
    again = prepared(Want(source, first_shard, samples, seq_len), 10**9, data, tokenizer)
    assert again.manifest == shards.manifest


def test_the_background_makes_what_is_wanted_of_every_source(data: DataConfig, tokenizer: Tokenizer) -> None:
    wants = [Want(source, 0, 200, 32) for source in data.weights]
    with Supply(wants, data, tokenizer.path) as supply:
        until(lambda: not supply._process.is_alive())
        assert supply.fault() is None
    for want in wants:
        made = Shards.open(shards_folder(want.source, data, tokenizer))
        assert want.met(made, 200)
        other = data.model_copy(update={"shards_dir": data.shards_dir / "by_hand"})
        by_hand = prepare_shards(want.source, other, tokenizer, tokens=made.train_tokens)
        assert made.manifest == by_hand.manifest


def test_an_error_in_the_background_arrives_as_it_is(data: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with Supply([Want(str(tmp_path / "nowhere"), 0, 1, 8)], data, tokenizer.path) as supply:
        until(lambda: supply.fault() is not None)
        fault = supply.fault()
        assert isinstance(fault, UserError) and "nowhere" in str(fault) and "\n" not in str(fault)
        assert supply.fault() is fault


def test_a_killed_background_is_started_once_more_and_then_reported(data: DataConfig, tokenizer: Tokenizer) -> None:
    want = Want(next(iter(data.weights)), 0, 300, 32)

    def kill() -> None:
        os.kill(supply._process.pid or 0, signal.SIGKILL)
        supply._process.join()

    with Supply([want], data, tokenizer.path) as supply:
        kill()
        assert supply.fault() is None
        until(lambda: not supply._process.is_alive())
        assert supply.fault() is None
        assert want.met(Shards.open(shards_folder(want.source, data, tokenizer)), 300)
    with Supply([want], data, tokenizer.path) as supply:
        kill()
        assert supply.fault() is None
        kill()
        assert "killed by signal 9; lower data.workers" in str(supply.fault())


def test_leaving_stops_the_background(data: DataConfig, tokenizer: Tokenizer) -> None:
    with Supply([Want(next(iter(data.weights)), 0, 300, 32)], data, tokenizer.path) as supply:
        process = supply._process
    assert process.exitcode == -signal.SIGTERM


@pytest.mark.slow
def test_the_background_ends_with_its_parent_however_it_ends(data: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    program = f"""
        import time
        from pathlib import Path
        from minifoundation.config import DataConfig
        from minifoundation.data.supply import Supply, Want
        data = DataConfig.model_validate_json({data.model_dump_json()!r})
        supply = Supply([Want({str(tmp_path / "fifo.txt")!r}, 0, 300, 32)], data, Path({str(tokenizer.path)!r}))
        print(supply._process.pid, flush=True)
        time.sleep(60)
    """
    os.mkfifo(tmp_path / "fifo.txt")  # nobody writes to it, so reading it does not end
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(3)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until(lambda: not Path(f"/proc/{child}").exists(), 10)


def test_the_background_does_without_torch() -> None:
    check = "import sys, minifoundation.data.supply; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
