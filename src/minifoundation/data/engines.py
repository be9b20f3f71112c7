"""Where the work on a corpus is done: in processes of this machine, on a Ray cluster or in Slurm jobs."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Future
from contextlib import closing, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal, Protocol

from minifoundation.data.pieces import Piece
from minifoundation.errors import UserError

Task = Callable[[int, Piece], None]
"""Work on one piece, given its number; it can be pickled, leaves its result in files, and may be done again after a kill."""

ATTEMPTS = 3
"""A piece whose process dies is tried again; one that has done so this often is an error."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""For a worker's environment: starting the threads of a BLAS that it never uses takes numpy longer than all the rest of its import."""


class Engine(Protocol):
    """Does tasks on pieces of a corpus, several at a time."""

    ahead: int
    """Pieces worth having in work at once."""

    def submit(self, task: Task, pieces: Iterable[tuple[int, Piece]]) -> list[Future[None]]:
        """Return a future for each piece, which holds the task's error when it fails; a piece may begin before the next is listed."""

    def close(self) -> None:
        """Stop at once, whatever is still in work."""


@contextmanager
def cluster(
    name: Literal["local", "ray", "slurm"], folder: Path, *, slurm: str | None = None, workers: int | None = None
) -> Iterator[Engine | None]:
    """Return the engine of that name, closed at the end of the context; None for ``local``, which is started where it is worth it.

    Args:
        folder: which every machine of the cluster sees; Slurm's scripts and logs are kept below it.
        slurm: options for sbatch, as in ``partition=cpu,time=04:00:00``.
        workers: Slurm jobs at a time.

    Raises:
        UserError: the cluster is not there, or ``slurm`` is not a list of options or given for another engine.
    """
    if slurm is not None and name != "slurm":
        raise UserError("--slurm", f"{slurm} is given, but --engine is {name}", "add --engine slurm, or leave --slurm out")
    match name:
        case "local":
            yield None
            return
        case "ray":
            from minifoundation.data.clusters import ray_engine

            engine = ray_engine(folder)
        case "slurm":
            from minifoundation.data.clusters import slurm_engine

            engine = slurm_engine(_options(slurm or ""), folder, workers)
    with closing(engine):
        yield engine


def in_process() -> Engine:
    """Return the engine that does each task at once in the caller's own process: for work that is shorter than a process's start."""
    return _InProcess()


def local(workers: int) -> Engine:
    """Return an engine of ``workers`` processes of this machine.

    They are started when there is work for them, end with this process however it ends, and leave Ctrl-C to it. The piece of
    one that dies is done again by a new one.
    """
    return _Local(workers)


class _InProcess:
    ahead = 1

    def submit(self, task: Task, pieces: Iterable[tuple[int, Piece]]) -> list[Future[None]]:
        return [_done(task, number, piece) for number, piece in pieces]

    def close(self) -> None:
        pass


def _done(task: Task, number: int, piece: Piece) -> Future[None]:
    future: Future[None] = Future()
    try:
        task(number, piece)
    except Exception as error:
        future.set_exception(error)
    else:
        future.set_result(None)
    return future


class _Local:
    """One thread for each worker process, so that a death is the doing of one known piece.

    A pool of ``concurrent.futures`` breaks as a whole when one process dies, and does not say which piece killed it.
    """

    def __init__(self, workers: int) -> None:
        self.ahead = 3 * workers
        self._jobs: queue.SimpleQueue[tuple[Future[None], Task, int, Piece] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._workers: list[_Worker] = []
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Task, pieces: Iterable[tuple[int, Piece]]) -> list[Future[None]]:
        futures: list[Future[None]] = []
        for number, piece in pieces:
            futures.append(Future())
            self._jobs.put((futures[-1], task, number, piece))
        return futures

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.kill()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        for worker in self._workers:
            worker.close()

    def _serve(self) -> None:
        # The mask is inherited: Ctrl-C in a terminal goes to a worker as well, even while it is still starting.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        worker: _Worker | None = None
        while (job := self._jobs.get()) is not None:
            future, task, number, piece = job
            if self._closed:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                continue
            error: Exception | None = None
            for _ in range(ATTEMPTS):
                try:
                    worker = worker or self._started()
                    error = worker.done(task, number, piece)
                    break
                except _Died as death:
                    worker, error = None, _deadly(task, number, piece, death)
                except Exception as failure:  # the task cannot be pickled, or no process can be started
                    error = failure
                    break
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    def _started(self) -> _Worker:
        with self._lock:
            if self._closed:
                raise _Died("the engine is closed")
            worker = _Worker()
            self._workers.append(worker)
            return worker


class _Died(BrokenExecutor):
    """A worker process ended in the middle of its work."""


class _Worker:
    """A process and the pipe to it.

    It is not spawned by multiprocessing, which imports the parent's main module again in each: seconds, where that imports torch.
    """

    def __init__(self) -> None:
        self._pipe, other_end = multiprocessing.Pipe()
        paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from minifoundation.data.engines import work; work({other_end.fileno()})"],
            stdin=subprocess.PIPE,  # nothing is written to it, and it ends with this process
            pass_fds=[other_end.fileno()],
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": paths},
        )
        other_end.close()  # or the death of the process would not be seen as the end of the pipe

    def done(self, task: Task, number: int, piece: Piece) -> Exception | None:
        """Return None when the task is done, or its error."""
        try:
            self._pipe.send((task, number, piece))
            error: Exception | None = self._pipe.recv()
        except (EOFError, ConnectionError):
            code = self.close()
            raise _Died(f"killed by signal {-code}" if code < 0 else f"exit code {code}") from None
        return error

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> int:
        """Let go of a process that is ending, and return its exit code."""
        self._pipe.close()
        code = self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        return code


def work(pipe: int) -> None:
    """Do what comes through the pipe for as long as the parent lives; the entry of a worker process.

    Args:
        pipe: its file descriptor.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with Connection(pipe) as jobs:
        while True:
            try:
                task, number, piece = jobs.recv()
            except EOFError:
                return
            try:
                task(number, piece)
            except Exception as error:
                jobs.send(portable(error))
            else:
                jobs.send(None)


def _end_with_parent() -> None:
    os.read(0, 1)  # not through sys.stdin, whose lock the interpreter waits for when it ends
    os._exit(1)


def portable(error: Exception) -> Exception:
    """Return the error in a form that surely survives the pipe; those of libraries may not."""
    if isinstance(error, UserError):
        return error
    text = "".join(traceback.format_exception(error))
    if type(error).__module__ != "builtins":
        return RuntimeError(text)
    error.add_note(f"in a worker process:\n{text}")
    return error


def settle(future: Future[None], error: BaseException | None) -> None:
    """Give ``future`` its outcome, unless nobody wants it any more."""
    if not future.set_running_or_notify_cancel():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


def _deadly(task: Task, number: int, piece: Piece, death: _Died) -> UserError:
    names = ", ".join(dict.fromkeys(span.file.url for span in piece))
    where = names or f"task {number} of {type(task).__name__}"
    return UserError(
        where, f"ended its worker process {ATTEMPTS} times ({death})", "give the machine more memory, or set data.workers lower"
    )


def _options(text: str) -> dict[str, str]:
    options = dict(part.partition("=")[::2] for part in text.split(",") if part)
    if not all(options.values()):
        raise UserError(
            "--slurm", f"{text!r} is not a list of options", "write option=value,option=value, as in partition=cpu,time=04:00:00"
        )
    return options
