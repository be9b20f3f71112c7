"""Training on shards that are being made, struck down and on several processes, against the same run on shards that are there."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = """
model: {vocab_size: 512, d_model: 32, n_layer: 2, n_head: 4, n_kv_head: 2, d_ff: 64, original_seq_len: 64}
tokenizer: {vocab_size: 512}
data: {source: text, max_document_bytes: 1024, shard_tokens: 4096, held_out: 0.1}
# A rate at which the last bits, which differ between one process and two, do not grow.
train: {tokens: 61_440, seq_len: 64, lr: 2e-3, eval_every: 20, eval_tokens: 1024, save_every: 10, keep: 2}
"""
PROGRAM = """
import sys
from minifoundation import cli
from minifoundation.train import corpus, run

class Idle:
    "A background that makes nothing."
    def __init__(self, *_arguments): pass
    def fault(self): return None
    def __enter__(self): return self
    def __exit__(self, *_error): pass

if __name__ == "__main__":
    background, *arguments = sys.argv[1:]
    if background != "none":
        corpus.AT_ONCE = 1
    if background == "idle":
        run.Supply = Idle
    sys.exit(cli.main(arguments))
"""


def started(folder: Path, name: str, *, background: str = "supply", ranks: int = 1, resume: bool = False) -> subprocess.Popen[str]:
    """Start a run of 16 rows a step in outputs/<name>, with shards of its own and the tokenizer of the first run."""
    line = f"pretrain --config tiny.yaml --out_dir outputs/{name} --data.shards_dir shards/{name} --batch_size {8 // ranks} --grad_accum 2"
    first = folder / "outputs" / "whole" / "tokenizer" / "tokenizer.model"
    arguments = [background, *line.split(), *(["--tokenizer", str(first)] if name != "whole" else []), *(["--resume", "auto"] * resume)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, *(launch if ranks > 1 else []), "program.py", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, err[-4000:]
    return out + err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and one run, ``whole``, whose shards were there before it began to train."""
    folder = tmp_path_factory.mktemp("growing")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "program.py").write_text(PROGRAM)
    (folder / "text").mkdir()
    (folder / "text" / "verse.txt").write_bytes((ROOT / "examples" / "shakespeare.txt").read_bytes()[:600_000])
    ended(started(folder, "whole", background="none"))
    return folder


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    path = folder / "outputs" / name / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        kept = ("step", "loss", "held_out_bits_per_byte", "grad_norm")
        return [{column: row[column] for column in kept} for row in csv.DictReader(file)]


def shards(folder: Path, name: str) -> dict[str, bytes]:
    """Return the files of the shards that a run has left, except those that name its folder."""
    (made,) = (folder / "shards" / name).iterdir()
    return {path.name: path.read_bytes() for path in made.glob("*.bin")} | {
        "pairs": json.dumps(json.loads((made / "manifest.json").read_text())["pairs"]).encode()
    }


def until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_run_killed_while_its_shards_are_made_goes_on_to_the_same_losses_and_shards(folder: Path) -> None:
    for number, enough in enumerate((5, 25, 40)):
        process = started(folder, "killed", resume=number > 0)
        until(lambda enough=enough: len(rows(folder, "killed")) >= enough, process)  # type: ignore[misc]
        process.kill()
        process.communicate()
    ended(started(folder, "killed", resume=True))
    assert rows(folder, "killed") == rows(folder, "whole")
    assert shards(folder, "killed") == shards(folder, "whole")


@pytest.mark.slow
def test_two_processes_read_a_growing_folder_as_one_reads_a_grown_one(folder: Path) -> None:
    ended(started(folder, "two", ranks=2))
    for ours, alone in zip(rows(folder, "two"), rows(folder, "whole"), strict=True):
        for column in ("loss", "grad_norm", "held_out_bits_per_byte"):
            assert (ours[column] == "") == (alone[column] == "")
            assert not ours[column] or float(ours[column]) == pytest.approx(float(alone[column]), rel=2e-3), (ours, alone)
    assert shards(folder, "two") == shards(folder, "whole")


@pytest.mark.slow
def test_two_processes_that_wait_for_data_stop_at_the_same_step(folder: Path) -> None:
    process = started(folder, "waiting", background="idle", ranks=2)
    until(lambda: len(rows(folder, "waiting")) >= 3, process)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert "stopped at step" in err
    ended(started(folder, "waiting", resume=True, ranks=2))
    ended(started(folder, "grown", background="none", ranks=2))
    assert rows(folder, "waiting") == rows(folder, "grown")
