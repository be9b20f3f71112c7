import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path

import pytest

from minifoundation.data.engines import ATTEMPTS, Engine, cluster, in_process, local
from minifoundation.errors import UserError
from tests.data.tasks import PIECE, Noted, alive


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = local(2)
    yield engine
    engine.close()


def gone(pid: int) -> bool:
    """Wait until the process has ended."""
    for _ in range(100):
        if not alive(pid):
            return True
        time.sleep(0.1)
    return False


def test_every_piece_is_done_once_in_the_processes_of_the_engine(engine: Engine, tmp_path: Path) -> None:
    task = Noted(tmp_path, seconds=0.05)
    for future in engine.submit(task, [(number, PIECE) for number in range(20)]):
        assert future.result() is None
    runs = [task.pids(number) for number in range(20)]
    assert [len(pids) for pids in runs] == [1] * 20
    assert len({pid for (pid,) in runs}) == 2
    assert os.getpid() not in {pid for (pid,) in runs}


def test_the_engine_in_process_does_the_work_when_it_is_submitted(tmp_path: Path) -> None:
    task = Noted(tmp_path, fails=1)
    good, bad = in_process().submit(task, [(0, PIECE), (1, PIECE)])
    assert task.pids(0) == task.pids(1) == [os.getpid()]
    assert good.result() is None
    assert isinstance(bad.exception(), UserError)


def test_the_error_of_a_task_comes_back_as_it_was(engine: Engine, tmp_path: Path) -> None:
    futures = engine.submit(Noted(tmp_path, fails=1), [(number, PIECE) for number in range(3)])
    with pytest.raises(UserError, match=r"^a.jsonl: is broken; mend it$") as error:
        futures[1].result()
    assert (error.value.where, error.value.problem, error.value.remedy) == ("a.jsonl", "is broken", "mend it")
    assert [futures[0].result(), futures[2].result()] == [None, None]
    (missing,) = engine.submit(Noted(tmp_path / "missing"), [(0, PIECE)])
    with pytest.raises(FileNotFoundError) as fault:
        missing.result()
    assert fault.value.filename == str(tmp_path / "missing" / "0")
    assert "in __call__" in fault.value.__notes__[0]


def test_a_piece_whose_process_is_killed_is_done_again(engine: Engine, tmp_path: Path) -> None:
    task = Noted(tmp_path, dies_once=2)
    for future in engine.submit(task, [(number, PIECE) for number in range(5)]):
        future.result()
    assert [len(task.pids(number)) for number in range(5)] == [1, 1, 2, 1, 1]


def test_a_piece_that_always_kills_its_process_is_an_error_that_names_its_file(engine: Engine, tmp_path: Path) -> None:
    task = Noted(tmp_path, dies=1)
    futures = engine.submit(task, [(number, PIECE) for number in range(6)])
    with pytest.raises(UserError, match=rf"^a\.jsonl: ended its worker process {ATTEMPTS} times \(killed by signal 9\); give"):
        futures[1].result()
    assert [future.result() for number, future in enumerate(futures) if number != 1] == [None] * 5
    assert len(task.pids(1)) == ATTEMPTS
    assert all(len(task.pids(number)) == 1 for number in (0, 2, 3, 4, 5))


def test_a_deadly_task_without_a_file_is_named_itself(engine: Engine, tmp_path: Path) -> None:
    (future,) = engine.submit(Noted(tmp_path, dies=7), [(7, ())])
    with pytest.raises(UserError, match=rf"^task 7 of Noted: ended its worker process {ATTEMPTS} times"):
        future.result()


def test_a_worker_does_not_run_the_main_module_again(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from minifoundation.data.engines import local\n"
        "from tests.data.tasks import PIECE, Noted\n"
        "print('main', flush=True); engine = local(1)\n"
        "for future in engine.submit(Noted(Path(sys.argv[1])), [(0, PIECE)]): future.result()\n"
        "engine.close()"
    )
    noted = tmp_path / "noted"
    noted.mkdir()
    (tmp_path / "main.py").write_text(program)  # without the guard that multiprocessing asks for
    done = subprocess.run(
        [sys.executable, tmp_path / "main.py", noted],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("main\n", "")
    assert len(Noted(noted).pids(0)) == 1


def test_closing_stops_what_runs_and_starts_nothing_more(tmp_path: Path) -> None:
    engine = local(2)
    task = Noted(tmp_path, seconds=60)
    futures = engine.submit(task, [(number, PIECE) for number in range(4)])
    while not (task.pids(0) and task.pids(1)):
        time.sleep(0.05)
    began = time.monotonic()
    engine.close()
    assert time.monotonic() - began < 10
    assert wait(futures, timeout=10).not_done == set()
    assert gone(task.pids(0)[0]) and gone(task.pids(1)[0])
    assert task.pids(2) == task.pids(3) == []


def test_no_worker_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from minifoundation.data.engines import local\n"
        "from tests.data.tasks import PIECE, Noted\n"
        "for future in local(1).submit(Noted(Path(sys.argv[1]), seconds=60), [(0, PIECE)]): future.result()"
    )
    task = Noted(tmp_path)
    with subprocess.Popen([sys.executable, "-c", program, tmp_path]) as parent:
        while not task.pids(0):
            assert parent.poll() is None
            time.sleep(0.05)
        (worker,) = task.pids(0)
        assert alive(worker)
        parent.kill()
    assert gone(worker)


def test_an_interrupt_from_the_terminal_leaves_the_workers_to_their_parent(engine: Engine, tmp_path: Path) -> None:
    task = Noted(tmp_path, seconds=1)
    (future,) = engine.submit(task, [(0, PIECE)])
    while not task.pids(0):
        time.sleep(0.05)
    os.kill(task.pids(0)[0], signal.SIGINT)
    assert future.result() is None
    assert len(task.pids(0)) == 1


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(UserError("file", "is broken", "mend it")))
    assert (str(error), error.where) == ("file: is broken; mend it", "file")


def test_the_local_engine_is_left_to_prepare(tmp_path: Path) -> None:
    with cluster("local", tmp_path) as engine:
        assert engine is None
    with (
        pytest.raises(UserError, match=r"--slurm: partition=cpu is given, but --engine is local; add"),
        cluster("local", tmp_path, slurm="partition=cpu"),
    ):
        pass
    with (
        pytest.raises(UserError, match=r"--slurm: 'cpu' is not a list of options; write option=value"),
        cluster("slurm", tmp_path, slurm="cpu"),
    ):
        pass
