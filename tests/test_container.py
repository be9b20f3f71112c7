"""What a process may take of its machine, and of its container."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minifoundation import container
from minifoundation.container import cores, free_memory_bytes, memory_bytes


def test_cores_are_those_this_process_may_use() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from minifoundation.container import cores; print(cores())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"
    assert cores() >= 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000\n"}, 64),
        ({"cpu.max": "250000 100000\n"}, 3),
        ({"cpu.max": "6400000 50000\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ({}, 64),
    ],
)
def test_a_container_has_the_cores_of_its_share(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(container, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    assert cores() == expected


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
def test_memory_is_what_a_container_may_take(name: str, tmp_path: Path) -> None:
    whole = memory_bytes(tmp_path)
    limit = tmp_path / name
    limit.parent.mkdir(exist_ok=True)
    for text, expected in (("max\n", whole), (f"{2**63 - 4096}\n", whole), ("1000000\n", 1_000_000)):
        limit.write_text(text)
        assert memory_bytes(tmp_path) == expected


@pytest.mark.parametrize(
    ("folder", "most", "used", "reclaimable"),
    [
        (".", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
    ids=["v2", "v1"],
)
def test_free_memory_is_within_the_limit_of_a_container(tmp_path: Path, folder: str, most: str, used: str, reclaimable: str) -> None:
    plain = free_memory_bytes(tmp_path)
    assert plain > 100_000
    group = tmp_path / folder
    group.mkdir(exist_ok=True)
    (group / used).write_text("70000\n")
    (group / "memory.stat").write_text(f"anon 50000\n{reclaimable} 15000\n")
    (group / most).write_text("max\n")
    assert free_memory_bytes(tmp_path) > 100_000
    (group / most).write_text("90000\n")
    assert free_memory_bytes(tmp_path) == 90_000 - 70_000 + 15_000
