"""Shards of a data set of the Hub are the same whatever the network does, and whatever happens to the process that makes them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from math import inf
from pathlib import Path

import pytest

from minifoundation.config import TokenizerConfig
from minifoundation.data.tokenizer import Tokenizer, train_tokenizer
from tests.data.hub_server import Fault, Hub, hub
from tests.data.prepared import files
from tests.data.test_hub import FAULTS, texts, write_version

pytestmark = pytest.mark.slow

# The command itself with small pieces; a user would wait longer. A patience of 0 leaves the work to a process that has that of a user.
PREPARE = """
import sys
from minifoundation import cli
from minifoundation.data import pieces, prepare, remote

pieces.PIECE_BYTES = 40_000
if patience := float(sys.argv.pop(1)):
    remote.FIRST_WAIT_SECONDS, remote.PATIENCE_SECONDS = 0.02, patience
    prepare._is_small = lambda corpus: True
sys.exit(cli.main())
"""


class Preparation:
    """Runs of ``prepare`` on one data set of four pieces."""

    def __init__(self, root: Path, tokenizer: Tokenizer, *, patience: float = 60) -> None:
        self.shards = root / "shards"
        options = {"--data": "org/text", "--tokenizer": tokenizer.path, "--tokenizer_out": root / "tokenizer"}
        options |= {"--data.shards_dir": self.shards, "--data.shard_tokens": 20_000, "--data.held_out": 0.1, "--data.workers": 1}
        words = [str(word) for option in options.items() for word in option]
        self.command = [sys.executable, "-c", PREPARE, str(patience), "prepare", *words]

    def run(self, server: Hub) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command, env={**os.environ, **server.environment}, capture_output=True, text=True, timeout=120)

    def made(self) -> dict[str, bytes]:
        (folder,) = self.shards.iterdir()
        return files(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(texts(3), TokenizerConfig(vocab_size=512), tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    write_version(root, "org/text")
    return root


@pytest.fixture(scope="module")
def undisturbed(root: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], list[str]]:
    """The files of a run in which nothing goes wrong, and what it asks for of the text."""
    preparation = Preparation(tmp_path_factory.mktemp("undisturbed"), tokenizer)
    with hub(root) as server:
        done = preparation.run(server)
        assert done.returncode == 0, done.stderr
        assert len(text_requests(server)) == 8
        return preparation.made(), text_requests(server)


def text_requests(server: Hub) -> list[str]:
    """The row groups asked for, in order; the ends of files, where these are listed, are the first and longest ranges."""
    found = [f"{path[-24:]} {span}" for _, path, span in server.requests if span]
    return [one for one in found if int(one.partition("-")[2].rpartition("-")[2]) - int(one.rpartition("=")[2].partition("-")[0]) < 60_000]


@pytest.mark.parametrize("fault", FAULTS)
def test_shards_and_manifest_are_the_same_with_and_without_faults(
    root: Path, tokenizer: Tokenizer, undisturbed: tuple[dict[str, bytes], list[str]], tmp_path: Path, fault: str
) -> None:
    preparation = Preparation(tmp_path, tokenizer)
    with hub(root, {"org/text": replace(FAULTS[fault], everywhere=False)}) as server:  # listings are test_hub's, and take longer
        done = preparation.run(server)
        assert done.returncode == 0, done.stderr
        assert server.failed["org/text"] >= 8
    assert preparation.made() == undisturbed[0]


def test_giving_up_keeps_complete_shards_and_the_same_line_goes_on(
    root: Path, tokenizer: Tokenizer, undisturbed: tuple[dict[str, bytes], list[str]], tmp_path: Path
) -> None:
    preparation = Preparation(tmp_path, tokenizer, patience=0.5)
    with hub(root, {"org/text": Fault("503", times=inf, after=7)}) as server:
        done = preparation.run(server)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: hf://datasets/org/text@")
        assert last.endswith("cannot be read (HTTP 503 Service Unavailable); run the same command again; complete shards are kept")
        kept = preparation.made()
        del kept["manifest.json"]
        assert 2 <= len(kept) < len(undisturbed[0]) - 1
        assert kept.items() <= undisturbed[0].items()
        server.faults = {}
        done = preparation.run(server)
        assert done.returncode == 0, done.stderr
    assert preparation.made() == undisturbed[0]


def test_what_was_read_before_a_kill_is_not_asked_for_again(
    root: Path, tokenizer: Tokenizer, undisturbed: tuple[dict[str, bytes], list[str]], tmp_path: Path
) -> None:
    preparation = Preparation(tmp_path, tokenizer, patience=0)
    # Both ends of files, twice, and five row groups: the second of the third piece does not come.
    with hub(root, {"org/text": Fault("stall", times=inf, after=9)}) as server:
        with subprocess.Popen(preparation.command, env={**os.environ, **server.environment}, stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 60
            while not (server.failed["org/text"] and list(preparation.shards.glob("*/train-00001.bin"))):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            process.kill()
        server.faults = {}
        del server.requests[:]
        done = preparation.run(server)
        assert done.returncode == 0, done.stderr
        assert text_requests(server) == undisturbed[1][4:]
    assert preparation.made() == undisturbed[0]
