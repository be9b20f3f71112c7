"""``prepare`` by several processes, on one machine and on two: the bytes that one process makes, whoever dies."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.data.prepared import files
from tests.distributed.processes import ROOT, free_port, node, of_rank, started, torchrun, until, workers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A corpus of four pieces in two files, and how it is cut."""
    folder = tmp_path_factory.mktemp("corpus")
    scenes = (ROOT / "examples" / "shakespeare.txt").read_text(encoding="utf-8").split("\n\n")
    rng = random.Random(3)
    for name in ("a", "b"):
        rows = (json.dumps({"text": "\n".join(rng.choices(scenes, k=20))}) for _ in range(4_000))
        (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return [*f"--data {folder} --tokenizer.vocab_size 512 --tokenizer.sample_bytes 100_000 --data.shard_tokens 1_000_000".split(), *OUT]


OUT = ["--data.workers", "2", "--data.held_out", "0.01"]


def places(folder: Path) -> list[str]:
    return ["--tokenizer_out", str(folder / "tokenizer"), "--data.shards_dir", str(folder / "shards")]


def made(folder: Path) -> dict[str, bytes]:
    """Return the files of the one corpus below ``folder``."""
    (shards,) = (folder / "shards").iterdir()
    return files(shards)


@pytest.fixture(scope="module")
def alone(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    process = started([], [*options, *places(folder)], "prepare")
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    found = made(folder)
    assert len(found) > 10
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_make_the_bytes_of_one(size: int, options: list[str], alone: dict[str, bytes], tmp_path: Path) -> None:
    process = started(torchrun(size), [*options, *places(tmp_path)], "prepare")
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    assert printed.count("the end of the corpus") == 1 and made(tmp_path) == alone


def test_processes_that_nobody_watches_make_them_too(options: list[str], alone: dict[str, bytes], tmp_path: Path) -> None:
    """Without torchrun, as under srun: the first process holds the table, and must not leave before the others."""
    variables = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = ({**variables, "RANK": rank, "LOCAL_RANK": rank} for rank in "01")
    processes = [started([], [*options, *places(tmp_path)], "prepare", **each) for each in ranks]
    printed = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert made(tmp_path) == alone and "Traceback" not in "".join(printed)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_is_started_again_and_goes_on(rank: int, options: list[str], alone: dict[str, bytes], tmp_path: Path) -> None:
    process = started(torchrun(2, "--max_restarts", "1"), [*options, *places(tmp_path)], "prepare")
    until(lambda: bool(list(tmp_path.glob("shards/*/train-00001.bin"))), process)
    os.kill(of_rank(process.pid, rank), signal.SIGKILL)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    assert made(tmp_path) == alone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--data", "/nowhere"], "data.source: '/nowhere' is neither a known corpus nor a path"),
        (["--engine", "ray"], "--engine: ray under torchrun, which shares the work already; leave it out, or start one process"),
        (["--data.shard_tokens", "none"], "data.shard_tokens: 'none' is not valid"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_on_all(change: list[str], message: str, options: list[str], tmp_path: Path) -> None:
    process = started(torchrun(2), [*options, *places(tmp_path), *change], "prepare")
    printed, _ = process.communicate(timeout=120)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], printed
    assert "exitcode  : 2 " in printed and "exitcode  : 1 " not in printed, printed
    assert not list(tmp_path.glob("shards/*"))


def test_nodes_that_see_another_folder_are_told_before_the_work(options: list[str], tmp_path: Path) -> None:
    port = free_port()
    nodes = [started(node(port, number, size=1), [*options, *places(tmp_path / str(number))], "prepare") for number in (0, 1)]
    printed = "".join(each.communicate(timeout=120)[0] for each in nodes)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "shards: is another folder on " in errors[0], printed
    assert "(rank 1); give --data.shards_dir a folder that all machines share" in errors[0]
    assert [each.returncode for each in nodes] == [1, 1] and printed.count("exitcode  : 2 ") == 2  # torchrun's own is 1
    assert not list(tmp_path.glob("*/shards/.probe*")) and not list(tmp_path.glob("*/shards/*"))


def below(pid: int) -> list[int]:
    """Return the processes that ``pid`` has started, and those that these have."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # it has ended
            found += map(int, task.read_text().split())
    return [each for child in found for each in (child, *below(child))]


def test_two_nodes_share_a_folder_and_one_that_is_lost_costs_nothing_that_is_done(
    options: list[str], alone: dict[str, bytes], tmp_path: Path
) -> None:
    """The first says so and ends, whichever of them makes the shards, and the same lines go on."""
    port = free_port()
    nodes = [started(node(port, number, size=1), [*options, *places(tmp_path)], "prepare") for number in (0, 1)]
    until(lambda: len(workers(nodes[1].pid)) == 1, nodes[1])
    (lost,) = workers(nodes[1].pid).values()

    until(lambda: bool(below(lost)), nodes[1])
    enough = time.monotonic() + 5.0
    while time.monotonic() < enough:  # what the second one takes it keeps, and of four pieces the first one has three in work at most
        for pid in below(lost):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        time.sleep(0.02)
    for pid in (nodes[1].pid, lost, *below(lost)):  # torchrun first: a node that is lost does not start anything again
        os.kill(pid, signal.SIGKILL)
    nodes[1].communicate(timeout=60)
    printed, _ = nodes[0].communicate(timeout=200)
    assert nodes[0].returncode != 0 and "has been silent for 60 s; the same command continues after what is done" in printed, printed
    port = free_port()
    nodes = [started(node(port, number, size=1), [*options, *places(tmp_path)], "prepare") for number in (0, 1)]
    printed = "".join(each.communicate(timeout=200)[0] for each in nodes)
    assert [each.returncode for each in nodes] == [0, 0], printed
    assert printed.count("the end of the corpus") == 1 and made(tmp_path) == alone
