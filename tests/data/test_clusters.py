"""Ray and Slurm: a Ray cluster of two nodes on this machine, a Slurm that is there, or commands that stand in for it."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from minifoundation.config import DataConfig
from minifoundation.data import clusters
from minifoundation.data.clusters import PIECES_A_JOB, ray_engine, slurm_engine
from minifoundation.data.engines import ATTEMPTS
from minifoundation.data.tokenizer import Tokenizer
from minifoundation.errors import UserError
from tests.data.prepared import files, prepared
from tests.data.tasks import PIECE, Noted, Slowed, alive, until


@pytest.fixture
def noted(tmp_path: Path) -> Noted:
    folder = tmp_path / "noted"
    folder.mkdir()
    return Noted(folder)


@pytest.fixture
def expected(data: DataConfig, tokenizer: Tokenizer, tmp_path: Path, small_pieces: None) -> dict[str, bytes]:
    """The files that this process makes."""
    return files(prepared(data.model_copy(update={"shards_dir": tmp_path / "expected"}), tokenizer).folder)


# Ray


NODE = {"num_cpus": 1, "object_store_memory": 80 * 1024 * 1024}


@pytest.fixture(scope="module")
def ray_nodes() -> Iterator[Any]:
    """A cluster of two nodes with one CPU each."""
    pytest.importorskip("ray", reason="pip install -e '.[ray]'")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    try:
        cluster.add_node(**NODE)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture
def ray_cluster(ray_nodes: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("RAY_ADDRESS", ray_nodes.address)
    return ray_nodes


@pytest.mark.slow
def test_shards_of_a_ray_cluster_are_those_of_one_process(
    ray_cluster: Any, data: DataConfig, tokenizer: Tokenizer, expected: dict[str, bytes], noted: Noted, small_pieces: None
) -> None:
    with closing(ray_engine(data.shards_dir)) as engine:
        assert files(prepared(data, tokenizer, engine=Slowed(engine, Noted(noted.folder, seconds=0.3))).folder) == expected
    runs = [run for runs in noted.runs().values() for run in runs]
    assert len({node for *_, node in runs}) == 2, "one node did all the work"
    assert {folder for _, folder, _ in runs} == {str(Path.cwd())}
    assert not list(data.shards_dir.glob(".probe*"))


@pytest.mark.slow
def test_shards_are_the_same_when_a_process_and_a_node_of_the_cluster_die(
    ray_cluster: Any, data: DataConfig, tokenizer: Tokenizer, expected: dict[str, bytes], noted: Noted, small_pieces: None
) -> None:
    head = ray_cluster.head_node.node_id
    third = ray_cluster.add_node(**NODE)

    def kill() -> None:
        """Kill what is at work: a process on the head, and all of the third node."""
        until(lambda: len({runs[-1][2] for runs in noted.runs().values() if runs}) == 3)
        os.kill(next(int(runs[-1][0]) for _, runs in sorted(noted.runs().items(), reverse=True) if runs[-1][2] == head), signal.SIGKILL)
        ray_cluster.remove_node(third, allow_graceful=False)

    killer = threading.Thread(target=kill)
    with closing(ray_engine(data.shards_dir)) as engine:
        killer.start()
        shards = prepared(data, tokenizer, engine=Slowed(engine, Noted(noted.folder, seconds=1)))
        killer.join()
    assert files(shards.folder) == expected
    assert any(len(runs) > 1 for runs in noted.runs().values()), "nothing was lost"


@pytest.mark.slow
def test_a_ray_task_hands_back_its_own_error_and_one_that_dies_is_one_line(ray_cluster: Any, tmp_path: Path, noted: Noted) -> None:
    with closing(ray_engine(tmp_path)) as engine:
        failing = Noted(noted.folder, fails=1, dies=2)
        fine, failed, dead = engine.submit(failing, [(number, PIECE) for number in range(3)])
        assert fine.result(60) is None
        with pytest.raises(UserError, match=r"^a\.jsonl: is broken; mend it$"):
            failed.result(60)
        with pytest.raises(UserError, match="--engine: ray: a piece was lost with its process or machine"):
            dead.result(60)
        assert len(failing.runs()[2]) == ATTEMPTS
        running, waiting = engine.submit(Noted(noted.folder, seconds=600), [(3, PIECE), (4, PIECE)])
        until(lambda: failing.runs().keys() >= {3, 4})
        running.cancel()
        waiting.cancel()
        (after,) = engine.submit(noted, [(5, PIECE)])
        assert after.result(60) is None, "a task that nobody waits for goes on"


@pytest.mark.slow
def test_machines_that_do_not_share_the_folder_are_told_before_the_work(
    ray_cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "_mark", lambda path: None)
    with pytest.raises(UserError, match=r"shards: is another folder on .*; give --data.shards_dir a folder that all machines share"):
        ray_engine(tmp_path / "shards")

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(clusters, "_mark", refused)
    with pytest.raises(UserError, match=r"--engine: ray: .* cannot do the work .*Permission denied"):
        ray_engine(tmp_path / "shards")


def test_without_a_ray_cluster_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="pip install -e '.[ray]'")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(UserError, match=r"--engine: ray: 127.0.0.1:9 cannot be reached .*Connection refused.*; run ray start"):
        ray_engine(tmp_path)


def test_without_ray_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--engine: ray is not installed; pip install -e '.\[ray\]'"):
        ray_engine(tmp_path)


# Slurm

STAND_INS = {
    # Runs the elements of the array one after another, each in its own shell, and notes their processes.
    "sbatch": r"""
        for option in "$@"; do
            case $option in
                --array=0-*) last=${option#--array=0-};;
                --output=*) output=${option#--output=};;
                --chdir=*) folder=${option#--chdir=};;
                --partition=closed) echo "sbatch: error: invalid partition specified: closed" >&2; exit 1;;
            esac
        done
        echo "$@" >> $STATE/options
        job=$(( $(cat $STATE/last 2>/dev/null || echo 100) + 1 ))
        echo $job > $STATE/last
        cat > $STATE/script.$job
        for index in $(seq 0 $last); do touch $STATE/queue/${job}_$index; done
        (
            cd "$folder"
            for index in $(seq 0 $last); do
                [ -e $STATE/queue/${job}_$index ] || continue
                log=$(echo "$output" | sed "s/%a/$index/")
                SLURM_ARRAY_TASK_ID=$index setsid sh $STATE/script.$job >> "$log" 2>&1 &
                echo $! > $STATE/queue/${job}_$index
                wait $!
                rm -f $STATE/queue/${job}_$index
            done
        ) > /dev/null 2>&1 &
        echo "$job;cluster"
    """,
    "squeue": "ls $STATE/queue",
    "scancel": 'for job in "$@"; do pid=$(cat $STATE/queue/$job); rm -f $STATE/queue/$job; [ -z "$pid" ] || kill -9 -$pid; done',
}


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.slow)])
def slurm(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Slurm to submit to: the one this machine belongs to, or shell scripts that run what is submitted."""
    monkeypatch.setattr(clusters, "POLL_SECONDS", 0.2)
    monkeypatch.setattr(clusters, "GRACE_SECONDS", 2.0)
    if request.param == "real":
        if shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True).returncode != 0:
            pytest.skip("no Slurm runs here")
        yield "real"
        return
    commands, state = tmp_path / "commands", tmp_path / "state"
    commands.mkdir()
    (state / "queue").mkdir(parents=True)
    for name, body in STAND_INS.items():
        (commands / name).write_text(f"#!/bin/bash\nSTATE={state}\n{body}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    yield str(state)
    clusters._cancel([path.name for path in (state / "queue").iterdir()])


@pytest.mark.slow
def test_shards_of_slurm_jobs_are_those_of_one_process(
    slurm: str, data: DataConfig, tokenizer: Tokenizer, expected: dict[str, bytes], small_pieces: None
) -> None:
    with closing(slurm_engine({}, data.shards_dir)) as engine:
        assert files(prepared(data, tokenizer, engine=engine).folder) == expected
    assert not list(data.shards_dir.glob(".slurm*"))


def test_a_slurm_job_does_several_pieces_and_hands_back_their_errors(slurm: str, tmp_path: Path, noted: Noted) -> None:
    with closing(slurm_engine({"comment": "two words"}, tmp_path / "shards", workers=2)) as engine:
        assert engine.ahead == 4 * PIECES_A_JOB
        count = PIECES_A_JOB + 3
        futures = engine.submit(Noted(noted.folder, fails=4), [(number, PIECE) for number in range(count)])
        with pytest.raises(UserError, match=r"^a\.jsonl: is broken; mend it$"):
            futures.pop(4).result(60)
        assert [future.result(60) for future in futures] == [None] * (count - 1)
    runs = noted.runs()
    assert runs.keys() == set(range(count))
    assert all(len(each) == 1 for each in runs.values())
    processes = [runs[number][0][0] for number in range(count)]
    assert processes == [processes[number % 2] for number in range(count)] and processes[0] != processes[1]
    assert {each[0][1] for each in runs.values()} == {str(Path.cwd())}
    if slurm != "real":
        assert "--comment=two words" in (Path(slurm) / "options").read_text()


def test_a_slurm_job_that_dies_is_one_line_that_names_its_log(slurm: str, tmp_path: Path, noted: Noted) -> None:
    with closing(slurm_engine({}, tmp_path / "shards")) as engine:
        futures = engine.submit(Noted(noted.folder, dies=2), [(number, PIECE) for number in range(4)])
        with pytest.raises(UserError, match="is the log of a Slurm job that ended before its work was done; read it") as caught:
            futures[2].result(60)
        with pytest.raises(UserError):
            futures[3].result(60)
        assert [future.result() for future in futures[:2]] == [None, None]
    assert "ended with exit status 137" in Path(caught.value.where).read_text()


def test_jobs_that_nobody_waits_for_are_cancelled(slurm: str, tmp_path: Path, noted: Noted) -> None:
    with closing(slurm_engine({}, tmp_path / "shards")) as engine:
        (future,) = engine.submit(Noted(noted.folder, seconds=600), [(0, PIECE)])
        until(noted.runs)
        future.cancel()
        until(lambda: not alive(noted.pids(0)[-1]))
        (future,) = engine.submit(Noted(noted.folder, seconds=600), [(1, PIECE)])
        until(lambda: 1 in noted.runs())
    until(lambda: not alive(noted.pids(1)[-1]))
    assert future.cancelled()
    assert not list((tmp_path / "shards").iterdir())


def test_what_sbatch_refuses_is_one_line(slurm: str, tmp_path: Path, noted: Noted) -> None:
    with (
        closing(slurm_engine({"partition": "closed"}, tmp_path)) as engine,
        pytest.raises(UserError, match=r"--slurm: sbatch refused the job .*invalid partition specified: closed.*; give the options"),
    ):
        engine.submit(noted, [(0, PIECE)])


def test_slurm_that_does_not_answer_is_waited_for(slurm: str, tmp_path: Path, noted: Noted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_queued", lambda: None)
    with closing(slurm_engine({}, tmp_path)) as engine:
        (future,) = engine.submit(Noted(noted.folder, seconds=3), [(0, PIECE)])
        assert future.result(60) is None


def test_a_job_that_is_started_again_goes_on_with_the_piece_it_was_at(tmp_path: Path, noted: Noted) -> None:
    batch = tmp_path / "000000"
    pieces = [(number, PIECE) for number in range(10, 16)]
    dying = Noted(noted.folder, dies=14)
    batch.with_suffix(".pickle").write_bytes(pickle.dumps((dying, pieces)))
    job = partial(subprocess.run, [sys.executable, "-m", "minifoundation.data.clusters", str(batch), "0", "2"])
    assert job().returncode == -signal.SIGKILL
    batch.with_suffix(".pickle").write_bytes(pickle.dumps((noted, pieces)))
    assert job().returncode == 0
    assert {number: len(runs) for number, runs in noted.runs().items()} == {10: 1, 12: 1, 14: 2}


def test_without_slurm_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="--engine: slurm: there is no sbatch on this machine"):
        slurm_engine({}, tmp_path)
