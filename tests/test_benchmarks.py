"""Every program under benchmarks/ runs with --quick and ends with one line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = {"__init__", "apart", "crash_gpu", "life", "record", "small_model"}
PROGRAMS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in SHARED)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_quick(name: str, tmp_path: Path) -> None:
    options = ["--work", str(tmp_path)] if name == "first_run" else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    before = {path: path.read_bytes() for path in (ROOT / "docs" / "data").iterdir()}
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["benchmark"] == name and figures["quick"] is True
    assert {path: path.read_bytes() for path in (ROOT / "docs" / "data").iterdir()} == before, "a quick run keeps no figures"


@pytest.mark.parametrize("name", PROGRAMS)
def test_its_full_results_are_kept(name: str) -> None:
    kept = json.loads((ROOT / "docs" / "data" / f"{name}.json").read_text(encoding="utf-8"))
    assert kept["machine"]["command"].startswith(f"python -m benchmarks.{name}")
    assert kept["figures"] and kept["results"]
