"""Engines beyond one machine: the tasks of a Ray cluster, and the job arrays of Slurm.

Of the machines they ask that minifoundation is installed on each, and that the corpus and the shards are in folders that all of them
see under the same names.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from minifoundation.data.engines import ATTEMPTS, Engine, Task, portable, settle
from minifoundation.data.pieces import Piece
from minifoundation.errors import UserError

CONTACT_SECONDS = 10
"""For the head of a Ray cluster to answer; Ray itself would try for more than three minutes."""
PROBE_SECONDS = 120
"""For every machine to start a process that imports this package."""

JOBS = 32
"""Slurm jobs at a time."""
PIECES_A_JOB = 64
"""A minute of work or two: much more than Slurm needs to start a job."""
POLL_SECONDS = 2.0
GRACE_SECONDS = 60.0
"""A job that Slurm no longer knows may have left results that a network file system does not show yet."""


def ray_engine(folder: Path) -> Engine:
    """Return an engine of the Ray cluster at ``RAY_ADDRESS``, or the one this machine is a part of.

    A task takes one CPU. One whose process or machine dies is done again by Ray elsewhere.

    Args:
        folder: which all machines must share; this is tried out.

    Raises:
        UserError: Ray is not installed, there is no cluster, or a machine of it lacks this package or the folder.
    """
    try:
        import ray
        from ray.exceptions import RayError
    except ModuleNotFoundError:
        raise UserError("--engine", "ray is not installed", "pip install -e '.[ray]'") from None
    address = os.environ.get("RAY_ADDRESS", "auto")
    try:
        _contact(address)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # about GPUs, which no task here asks for
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise UserError(
            "--engine",
            f"ray: {address} cannot be reached ({_first_line(error)})",
            "run ray start --head, ray start --address=HOST:6379 on the other machines, and set RAY_ADDRESS=HOST:6379",
        ) from error
    try:
        _share(folder.absolute())
    except BaseException:
        ray.shutdown()
        raise
    return _Ray()


def slurm_engine(options: dict[str, str], folder: Path, workers: int | None = None) -> Engine:
    """Return an engine of Slurm jobs, each of which does several pieces one after another.

    A job that is preempted, or loses its machine, is put back into the queue by Slurm and goes on with the piece it was at.

    Args:
        options: of sbatch by their long names, as in ``{"partition": "cpu", "time": "04:00:00"}``.
        folder: which all machines must share; scripts and logs are kept in a folder below it, which stays when a job fails.
        workers: jobs at a time.

    Raises:
        UserError: there is no Slurm on this machine.
    """
    if shutil.which("sbatch") is None:
        raise UserError("--engine", "slurm: there is no sbatch on this machine", "run the same command where jobs are submitted")
    return _Slurm(options, folder.absolute() / f".slurm-{uuid.uuid4().hex[:8]}", workers or JOBS)


class _Ray:
    def __init__(self) -> None:
        import ray

        self.ahead = max(2, 3 * int(ray.cluster_resources().get("CPU", 1)))
        self._remote: Any = ray.remote(num_cpus=1, max_retries=ATTEMPTS - 1, scheduling_strategy="SPREAD")(_do)

    def submit(self, task: Task, pieces: Iterable[tuple[int, Piece]]) -> list[Future[None]]:
        futures: list[Future[None]] = []
        for number, piece in pieces:
            future: Future[None] = Future()
            done = self._remote.remote(Path.cwd(), task, number, piece)
            future.add_done_callback(partial(_withdraw, done))
            done.future().add_done_callback(partial(_hand_over, future))
            futures.append(future)
        return futures

    def close(self) -> None:
        import ray

        ray.shutdown()  # and with the driver, the cluster ends its processes


def _do(folder: Path, task: Task, number: int, piece: Piece) -> None:
    """Do a task on a machine of the cluster, where relative paths mean what they mean here."""
    with suppress(FileNotFoundError):  # absolute paths need no such folder
        os.chdir(folder)
    try:
        task(number, piece)
    except Exception as error:
        raise portable(error) from None


def _withdraw(done: Any, future: Future[None]) -> None:
    import ray

    if future.cancelled() and ray.is_initialized():
        ray.cancel(done, force=True)


def _hand_over(future: Future[None], done: Future[None]) -> None:
    """Give the outcome of a Ray task to ``future``: the task's own error, without Ray's wrapping."""
    from ray.exceptions import RayTaskError

    error = done.exception()
    if isinstance(error, RayTaskError):
        error = error.cause
    elif error is not None:
        lost = f"ray: a piece was lost with its process or machine ({_first_line(error)})"
        error = UserError("--engine", lost, "look into the cluster's logs, then run the same command again")
    settle(future, error)


def _contact(address: str) -> None:
    """Raise OSError unless somebody listens at ``host:port``, which may be of the form ``ray://host:port``."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=CONTACT_SECONDS).close()


def _share(folder: Path) -> None:
    """Let each machine of the Ray cluster write a file, and see whether it is there."""
    import ray
    from ray.exceptions import RayError, TaskUnschedulableError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    folder.mkdir(parents=True, exist_ok=True)
    write: Any = ray.remote(num_cpus=0)(_mark)
    nodes = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    marks = {node: folder / f".probe-{uuid.uuid4().hex}" for node in nodes}
    written = {
        node: write.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(mark)
        for node, mark in marks.items()
    }
    try:
        for node, host in nodes.items():
            try:
                ray.get(written[node], timeout=PROBE_SECONDS)
            except TaskUnschedulableError:  # it has died, which Ray notices after half a minute
                continue
            except RayError as error:
                found = _first_line(getattr(error, "cause", None) or error)
                raise UserError(
                    "--engine", f"ray: {host} cannot do the work ({found})", "install minifoundation and share the folders there"
                ) from error
            if not marks[node].exists():
                raise UserError(str(folder), f"is another folder on {host}", "give --data.shards_dir a folder that all machines share")
    finally:
        for mark in marks.values():
            mark.unlink(missing_ok=True)


def _mark(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@dataclass
class _Job:
    """An element of a job array."""

    log: Path
    waiting: dict[str, Future[None]]
    """By the names of the files that will hold the outcomes."""
    settled: list[Path] = field(default_factory=list)
    """Outcomes that were read. They stay while the job runs: one that Slurm starts again must not do those pieces again."""
    seen: float = field(default_factory=time.monotonic)
    """When Slurm last knew of it."""


class _Slurm:
    """One array for each call of ``submit``; a thread looks for outcomes, and for jobs that end without."""

    def __init__(self, options: dict[str, str], folder: Path, workers: int) -> None:
        self.ahead = 2 * workers * PIECES_A_JOB
        self._options = options
        self._folder = folder
        self._batches = 0
        self._failed = False
        self._jobs: dict[str, _Job] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._watch = threading.Thread(target=self._watched, daemon=True)

    def submit(self, task: Task, pieces: Iterable[tuple[int, Piece]]) -> list[Future[None]]:
        pieces = list(pieces)
        if not pieces:
            return []
        self._folder.mkdir(parents=True, exist_ok=True)
        batch = self._folder / f"{self._batches:06d}"
        self._batches += 1
        count = -(-len(pieces) // PIECES_A_JOB)
        batch.with_suffix(".pickle").write_bytes(pickle.dumps((task, pieces)))
        number = self._submitted(batch, count)
        futures: list[Future[None]] = [Future() for _ in pieces]
        with self._lock:
            for index in range(count):
                waiting = {_outcome(batch, place).name: futures[place] for place in range(index, len(pieces), count)}
                self._jobs[f"{number}_{index}"] = _Job(batch.with_name(f"{batch.name}-{index}.log"), waiting)
        if not self._watch.is_alive():
            self._watch.start()
        return futures

    def close(self) -> None:
        self._closed.set()
        if self._watch.is_alive():
            self._watch.join()
        _cancel(list(self._jobs))
        for job in self._jobs.values():
            for future in job.waiting.values():
                future.cancel()
        if not self._failed:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _submitted(self, batch: Path, count: int) -> str:
        """Return the number that Slurm gives to a new array of ``count`` jobs."""
        work = f'"{sys.executable}" -m {__name__} "{batch}" "$SLURM_ARRAY_TASK_ID" {count}'
        script = f'#!/bin/sh\n{work} || {{ status=$?; echo "ended with exit status $status"; exit $status; }}\n'
        given = {
            "parsable": None,
            "array": f"0-{count - 1}",
            "job-name": "minifoundation",
            "chdir": str(Path.cwd()),
            "output": f"{batch}-%a.log",
            "open-mode": "append",
            "requeue": None,
            "ntasks": "1",
            **self._options,
        }
        command = ["sbatch", *(f"--{name}" if value is None else f"--{name}={value}" for name, value in given.items())]
        result = subprocess.run(command, input=script, capture_output=True, text=True)
        if result.returncode != 0:
            reason = result.stderr.strip().replace("\n", "; ")
            raise UserError("--slurm", f"sbatch refused the job ({reason})", "give the options that the cluster asks for")
        return result.stdout.strip().partition(";")[0]

    def _watched(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            try:
                with self._lock:
                    self._look()
            except Exception as error:
                for future in [future for job in self._jobs.values() for future in job.waiting.values()]:
                    settle(future, error)
                return

    def _look(self) -> None:
        """Hand over the outcomes that are there, and find the jobs that ended without."""
        queued = _queued()
        there = {path.name for path in self._folder.glob("*.done")}
        for name, job in list(self._jobs.items()):
            if queued is None or name in queued:
                job.seen = time.monotonic()
            for outcome in job.waiting.keys() & there:
                job.settled.append(self._folder / outcome)
                settle(job.waiting.pop(outcome), pickle.loads(job.settled[-1].read_bytes()))
            unwanted = all(future.cancelled() for future in job.waiting.values())
            if unwanted and job.waiting:
                _cancel([name])
            lost = not unwanted and time.monotonic() - job.seen > GRACE_SECONDS
            if lost:
                self._lose(job)
            if unwanted or lost:
                for path in job.settled:
                    path.unlink(missing_ok=True)
                del self._jobs[name]

    def _lose(self, job: _Job) -> None:
        self._failed = True
        while job.waiting:
            _, future = job.waiting.popitem()
            problem = "is the log of a Slurm job that ended before its work was done"
            remedy = "read it; --slurm mem=4G,time=02:00:00 asks for more; the same command continues after what is done"
            settle(future, UserError(str(job.log), problem, remedy))


def _queued() -> set[str] | None:
    """Return this user's jobs that wait or run, as ``123_4``; None when Slurm does not answer."""
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={os.getuid()}"]
    result = subprocess.run(command, capture_output=True, text=True)
    return set(result.stdout.split()) if result.returncode == 0 else None


def _cancel(jobs: list[str]) -> None:
    if jobs:
        subprocess.run(["scancel", *jobs], capture_output=True)


def _outcome(batch: Path, place: int) -> Path:
    return batch.with_name(f"{batch.name}-{place:06d}.done")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _job(batch: Path, index: int, count: int) -> None:
    """Do every ``count``-th piece of the batch from ``index`` on: what a Slurm job runs."""
    task, pieces = pickle.loads(batch.with_suffix(".pickle").read_bytes())
    for place, (number, piece) in list(enumerate(pieces))[index::count]:
        if _outcome(batch, place).exists():
            continue
        error = None
        try:
            task(number, piece)
        except Exception as failure:
            error = portable(failure)
        part = _outcome(batch, place).with_suffix(".part")
        part.write_bytes(pickle.dumps(error))
        part.replace(_outcome(batch, place))


if __name__ == "__main__":
    _job(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
