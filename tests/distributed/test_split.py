"""Two processes train as one does, whatever way they share the model: the cases are in equal.py, in one start of two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.processes import ROOT, torchrun


@pytest.mark.parametrize("precision", ["fp32", pytest.param("half", marks=pytest.mark.slow)])
def test_two_processes_are_as_one(tmp_path: Path, precision: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *torchrun(2), "-m", "tests.distributed.equal", str(tmp_path), precision]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "all equal" in done.stdout
