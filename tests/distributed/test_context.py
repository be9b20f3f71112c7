"""Processes that read a row together: who has which tokens, and that they train as one does (equal_rows.py, in one start)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minifoundation.distributed import Context, World, sharing_rows
from minifoundation.errors import UserError
from tests.distributed.processes import ROOT, torchrun


@pytest.mark.parametrize(("size", "which"), [(2, "quick"), (2, "compiled"), (4, "all")], ids=str)
@pytest.mark.slow
def test_processes_that_share_rows_are_as_one(tmp_path: Path, size: int, which: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *torchrun(size), "-m", "tests.distributed.equal_rows", str(tmp_path), which]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "all equal" in done.stdout


def contexts(size: int) -> list[Context]:
    """Return what each of ``size`` processes sees of them."""
    meshes: list[Any] = [SimpleNamespace(size=lambda: size, get_local_rank=lambda rank=rank: rank) for rank in range(size)]
    return [Context(mesh) for mesh in meshes]


@pytest.mark.parametrize("size", [2, 3, 8])
def test_each_token_is_read_once_and_all_attend_to_as_many(size: int) -> None:
    seq_len = 48 * size
    places = [[place for first, end in one.chunks(seq_len) for place in range(first, end)] for one in contexts(size)]
    assert sorted(place for mine in places for place in mine) == list(range(seq_len))
    assert len({sum(place + 1 for place in mine) for mine in places}) == 1


def test_groups_are_of_neighbours() -> None:
    worlds = [World(rank, 6, context=contexts(3)[rank % 3]) for rank in range(6)]
    assert [(one.dp_rank, one.dp_size, one.cp_size) for one in worlds] == [(rank // 3, 2, 3) for rank in range(6)]
    assert (World(4, 6).dp_rank, World(4, 6).dp_size, World(4, 6).cp_size) == (4, 6, 1)


@pytest.mark.parametrize(("world", "told"), [(World(), "there is 1 process"), (World(0, 3), "there are 3 processes")])
def test_processes_that_do_not_fall_into_groups(world: World, told: str) -> None:
    with pytest.raises(UserError, match=rf"^train.context_parallel: 2, and {told}; start a multiple of it"):
        sharing_rows(world, 2)
