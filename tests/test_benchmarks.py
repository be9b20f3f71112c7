"""Every program under benchmarks/ runs with --quick and ends with one line of JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

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


def test_the_figures_of_long_context_are_those_of_its_results() -> None:
    from benchmarks.long_context import summary

    kept = json.loads((ROOT / "docs" / "data" / "long_context.json").read_text(encoding="utf-8"))
    assert {name: kept["figures"][name] for name in summary(kept["results"])} == summary(kept["results"])


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "data").glob("*.json")), ids=lambda path: path.stem)
def test_commands_name_no_place_of_one_machine(path: Path) -> None:
    """What they name is told in docs/data/README.md."""
    text = path.read_text(encoding="utf-8")
    words = [word for line in re.findall(r'"command": "((?:[^"\\]|\\.)*)"', text) for word in line.split()]
    assert not [word for word in words if re.match(r"/|~|\.+\w*/", word)]
    named = {
        word for before, word in pairwise(words) if before in ("--corpus", "--data", "--tokenizer", "--data_dir", "--gguf", "--held_out")
    }
    told = (ROOT / "docs" / "data" / "README.md").read_text(encoding="utf-8")
    assert not [name for name in named if f"`{Path(name).name}`" not in told and f"`{name}`" not in told]


def test_gpus_are_compared_with_the_slowest_of_them_by_itself() -> None:
    from benchmarks.scaling import apart

    alone = {"tokens_per_second": 1000.0, "ms_per_step": 100.0, "ms_of_each": [[100, 90, 110], [130, 80, 120], [50, 300, 50]]}
    assert apart(alone, 1) == (1000.0, 100)
    assert apart(alone, 2) == pytest.approx((100_000 / 120, 120))  # 130, 90 and 120 where both wait for each other
    assert apart(alone, 3) == pytest.approx((100_000 / 120, 130))  # the third is the fastest but for one step
    assert apart({"tokens_per_second": 1000.0, "ms_per_step": 100.0}, 4) == (1000.0, 100.0)


def test_the_model_of_several_gpus_on_paper() -> None:
    from benchmarks.scaling import paper

    sizes = {"parameters": 500_000_000, "head": 100_000_000, "seconds": 0.3, "optimizer": 0.01, "node": 8}
    one: dict[str, Any] = {**sizes, "links": 100e9, "network": 10e9}
    for parallel in ("ddp", "fsdp"):
        assert paper(**one, gpus=1, parallel=parallel)["efficiency"] == 1.0
    # Half of 2 GB of gradients, and half of 1.2 GB of weights, 0.8 of them in 2 bytes; and half the optimizer is the other's.
    two = paper(**one, gpus=2, parallel="ddp")
    assert two["communication_seconds"] == pytest.approx(0.01 + 0.006) and two["seconds"] == pytest.approx(0.3 - 0.005 + 0.016)
    # In two machines 7 of 8 parts go by the links. A GPU's own rows, 0.25 GB, are summed over both; a fifth is the embedding's, known last.
    machines = paper(**one, gpus=16, parallel="ddp")
    assert machines["seconds"] == pytest.approx(0.3 - 0.01 * 7 / 8 + (0.02 + 0.012) * 7 / 8 + 0.025 / 5)
    # A network that is slower than the backward is waited for: all of it but what 0.2 s hide.
    slow = paper(**{**one, "network": 1e9}, gpus=16, parallel="ddp")
    assert slow["seconds"] == pytest.approx(0.3 - 0.01 * 7 / 8 + (0.02 + 0.012) * 7 / 8 + 0.25 - 0.2)
    # Half of 2 GB scattered, twice half of 1 GB gathered; a fifth, the embedding's, is waited for: the first gather, the last sum.
    sharded = paper(**one, gpus=2, parallel="fsdp")
    assert sharded["communication_seconds"] == pytest.approx(0.02) and sharded["seconds"] == pytest.approx(0.3 - 0.005 + 0.002 + 0.001)
