from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from minifoundation.evaluate.sandbox import Sandbox, sandbox
from minifoundation.evaluate.tasks import humaneval_result, mbpp_result
from tests.evaluate.tiny import WHOLE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the guard's limits are Linux's")


def test_a_right_program_passes_and_wrong_ones_fail() -> None:
    passes = sandbox().passes
    assert passes("import math, re, typing, collections\nassert math.gcd(12, 18) == 6")
    assert not passes("assert 1 + 1 == 3")
    assert not passes("def f(:")
    assert not passes("import sys\nsys.exit(0)"), "leaving early is not passing"


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import os\nwhile True: os.fork()",
        "import threading\nwhile True: threading.Thread(target=input).start()",
        "x = bytearray(8 << 30)",
        "x = []\nwhile True: x.append('x' * 1_000_000)",
        "while True: print('x' * 1_000_000)",
        "with open('big', 'w') as f:\n    while True: f.write('x' * 1_000_000)",
        "import subprocess\nsubprocess.run(['true'], check=True)",
        "import numpy",
    ],
)
def test_what_runs_away_or_reaches_out_is_stopped(program: str) -> None:
    start = time.monotonic()
    assert not sandbox().passes(program, seconds=1)
    assert time.monotonic() - start < 15


def test_no_process_outlives_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = (1 << 30) + os.getpid()
    monkeypatch.setattr("minifoundation.evaluate.sandbox.MEMORY", mark)

    def alive() -> bool:
        for command in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if f"\0{mark}\0".encode() in command.read_bytes():
                    return True
        return False

    run = threading.Thread(target=sandbox().passes, args=("import time; time.sleep(60)",), kwargs={"seconds": 1})
    run.start()
    deadline = time.monotonic() + 10
    while not alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert alive(), "the program was seen while it ran"
    run.join()
    deadline = time.monotonic() + 5  # killed it is by now; the system may take a moment to bury it
    while alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive()


def test_this_process_cannot_be_signalled() -> None:
    if not sandbox().prefix:
        pytest.skip("this system gives no process namespace")
    signal_us = f"import os\nos.kill({os.getpid()}, 0)"
    assert not sandbox().passes(signal_us)


def test_the_environment_is_empty_and_the_folder_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "1")
    assert sandbox().passes("import os\nassert 'SECRET' not in os.environ and 'HOME' not in os.environ")
    assert sandbox().passes("import os\nassert os.listdir() == []\nopen('a', 'w').write('x')\nassert open('a').read() == 'x'")


def test_files_outside_are_neither_written_nor_removed(tmp_path: Path) -> None:
    if "no writing outside the folder: yes" not in sandbox().description():
        pytest.skip("this kernel has no Landlock")
    victim = tmp_path / "victim"
    victim.write_text("safe")
    for attack in (
        "open({!r}, 'w')",
        "import os; os.remove({!r})",
        "import os; os.rename({!r}, 'mine')",
        "import os; os.truncate({!r}, 0)",
    ):
        assert not sandbox().passes(attack.format(str(victim)))
    assert not sandbox().passes(f"open({str(tmp_path / 'new')!r}, 'w')")
    assert victim.read_text() == "safe"
    assert not (tmp_path / "new").exists()


def test_there_is_no_network() -> None:
    if not sandbox().prefix:
        pytest.skip("this system gives no network namespace")
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        reach = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)"
        assert not sandbox().passes(reach)
        assert Sandbox(()).passes(reach), "without the namespace the same program connects: the test can fail"


def test_what_holds_is_said() -> None:
    said = sandbox().description()
    assert "no further processes: yes" in said
    assert "no network: NO" in Sandbox(()).description()


def humaneval() -> list[dict[str, Any]]:
    from pyarrow import parquet

    path = WHOLE / "openai/openai_humaneval/openai_humaneval/test.parquet"
    if not path.exists():
        pytest.skip(f"the complete HumanEval is not at {path}")
    return list(parquet.read_table(path).to_pylist())


def test_a_completion_is_scored_by_the_tests_of_its_problem() -> None:
    doc = {
        "prompt": 'def double(x: int) -> int:\n    """Return twice x."""\n',
        "test": "def check(candidate):\n    assert candidate(2) == 4\n",
        "entry_point": "double",
    }
    assert humaneval_result(doc, ["    return 2 * x\n"]) == {"pass@1": 1.0}
    assert humaneval_result(doc, ["    return 3 * x\n"]) == {"pass@1": 0.0}
    task = {"test_setup_code": "", "test_list": ["assert double(2) == 4", "assert double(0) == 0", "assert double(-1) == -2"]}
    assert mbpp_result(task, ["def double(x):\r\n    return x + x\r\n"]) == {"pass@1": 1.0}
    assert mbpp_result(task, ["def double(x):\n    return x * x\n"]) == {"pass@1": 0.0}


def test_five_canonical_solutions_of_humaneval_pass() -> None:
    assert all(humaneval_result(doc, [doc["canonical_solution"]])["pass@1"] for doc in humaneval()[:5])


@pytest.mark.slow
def test_all_canonical_solutions_of_humaneval_pass() -> None:
    docs = humaneval()
    failed = [doc["task_id"] for doc in docs if not humaneval_result(doc, [doc["canonical_solution"]])["pass@1"]]
    assert len(docs) == 164 and failed == []


@pytest.mark.slow
def test_an_empty_completion_of_humaneval_fails() -> None:
    assert not any(humaneval_result(doc, ["    pass\n"])["pass@1"] for doc in humaneval()[:40])


def test_a_program_with_odd_characters_is_read_as_it_is() -> None:
    assert sandbox().passes(f"assert {json.dumps('naïve ☃')} == 'na\\u00efve \\u2603'")
    assert not sandbox().passes("x = '\ud800'\nassert x == 'a'")
