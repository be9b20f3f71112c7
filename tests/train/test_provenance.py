"""The line that goes on, from lines as they are typed."""

from __future__ import annotations

import sys

import pytest

from minifoundation.distributed import World
from minifoundation.train.provenance import typed

PYTHON = "/venv/bin/python"


@pytest.mark.parametrize(
    ("line", "argv0", "world", "expected"),
    [
        (
            ["python", "-m", "src.cli", "pretrain", "--data", "a b"],
            "src/cli.py",
            World(),
            "python -m src.cli pretrain --data 'a b' --resume auto",
        ),
        (
            ["python", "-m", "src.cli", "pretrain", "--resume", "x/step_00000001", "--bf16"],
            "src/cli.py",
            World(),
            "python -m src.cli pretrain --bf16 --resume auto",
        ),
        (["python", "-m", "src.cli", "pretrain", "--resume=none"], "src/cli.py", World(), "python -m src.cli pretrain --resume auto"),
        ([PYTHON, "/venv/bin/sh", "longft"], "/venv/bin/sh", World(), "sh longft --resume auto"),
        ([PYTHON, "/no/such/program", "longft"], "/no/such/program", World(), f"{PYTHON} /no/such/program longft --resume auto"),
        (
            [PYTHON, "-u", "-m", "src.cli", "pretrain"],
            "src/cli.py",
            World(0, 8, 0, 8),
            "torchrun --nproc_per_node 8 -m src.cli pretrain --resume auto",
        ),
        (
            [PYTHON, "-u", "-m", "src.cli", "pretrain"],
            "src/cli.py",
            World(9, 16, 1, 8),
            "torchrun --nnodes 2 --nproc_per_node 8 -m src.cli pretrain --resume auto",
        ),
    ],
)
def test_the_line_that_goes_on(monkeypatch: pytest.MonkeyPatch, line: list[str], argv0: str, world: World, expected: str) -> None:
    command = next(index for index, word in enumerate(line) if word in ("pretrain", "longft"))
    monkeypatch.setattr(sys, "orig_argv", line)
    monkeypatch.setattr(sys, "argv", [argv0, *line[command:]])
    assert typed(world, resume="auto") == expected


def test_either_spelling_of_a_setting_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["pretrain", "--train.batch_size", "8", "--grad_accum=4", "--model.checkpointing", "none", "--lr", "1"]
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "src.cli", *line])
    monkeypatch.setattr(sys, "argv", ["src/cli.py", *line])
    options = {"batch_size": 2, "grad_accum": 16, "model.checkpointing": "full"}
    assert typed(World(), **options) == "python -m src.cli pretrain --lr 1 --batch_size 2 --grad_accum 16 --model.checkpointing full"


def test_secrets_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["pretrain", "--data", "https://user:hf_token@host/a.jsonl"]
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "src.cli", *line])
    monkeypatch.setattr(sys, "argv", ["src/cli.py", *line])
    assert "hf_token" not in typed(World()) and "***@host/a.jsonl" in typed(World())
