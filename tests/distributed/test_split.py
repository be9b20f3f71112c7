"""Two processes train as one does, whatever way they share the model: the cases are in equal.py, in one start of two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.processes import ROOT, torchrun


def processes(module: str, *options: str, size: int = 2) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *torchrun(size), "-m", module, *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("half", marks=pytest.mark.slow)])
def test_processes_are_as_one(tmp_path: Path, precision: str) -> None:
    done = processes("tests.distributed.equal", str(tmp_path), precision)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "all equal" in done.stdout


@pytest.mark.slow
def test_two_machines_of_two_owners_are_as_one(tmp_path: Path) -> None:
    done = processes("tests.distributed.equal", str(tmp_path), "both", size=4)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "all equal" in done.stdout


@pytest.mark.slow
def test_a_process_that_is_out_of_memory_takes_the_others_along_or_says_so() -> None:
    """Of 16 rows 4 at once fit the second one; where it gives up in the middle of a step, the first would wait for it for ever."""
    done = processes("tests.distributed.crowded")
    assert "agreed" in done.stdout and done.returncode == 1, done.stderr[-4000:]
    problem = "rank 1 has no memory for 16 rows, and other processes, which have, do not come out of their step"
    assert f"error: train.batch_size: {problem}; give --batch_size 8 --grad_accum 2\n" in done.stderr
