"""What of QuACK can be tested without a GPU; its products are in tests/gpu."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minifoundation.model.kernels import gated

CPU = torch.device("cpu")


class Patient(subprocess.Popen[bytes]):
    """A process that is not killed, so that what it ends with tells whether its program runs."""

    started: list[Patient]

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[call-overload]
        self.started.append(self)

    def kill(self) -> None:
        pass


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Patient]:
    """Give QuACK a cache in ``tmp_path``, and return the processes that are started from then on."""
    processes: list[Patient] = []
    monkeypatch.setattr(Patient, "started", processes, raising=False)
    monkeypatch.setattr(subprocess, "Popen", Patient)
    monkeypatch.setattr(gated, "load", lambda _: SimpleNamespace(get_cache_path=lambda: tmp_path))
    return processes


def test_the_first_start_compiles_in_another_process(started: list[Patient]) -> None:
    with gated.compiled_beside(CPU, torch.bfloat16):
        assert len(started) == 1
    assert started[0].returncode == 0, "the program runs; that QuACK fails on a CPU is for ``fault`` to say"


def test_later_starts_find_the_cache(started: list[Patient], tmp_path: Path) -> None:
    (tmp_path / "version").mkdir()
    (tmp_path / "version" / "kernel.o").touch()
    with gated.compiled_beside(CPU, torch.bfloat16):
        pass
    assert started == []


def test_a_quack_that_cannot_be_imported_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> None:
        raise ImportError("no module named cutlass")

    monkeypatch.setattr(gated, "load", broken)
    with gated.compiled_beside(CPU, torch.bfloat16):
        pass


def test_what_is_not_needed_any_more_does_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sleeping = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(gated, "_compiling", lambda *_: sleeping)
    with pytest.raises(KeyboardInterrupt), gated.compiled_beside(CPU, torch.bfloat16):
        raise KeyboardInterrupt
    assert sleeping.returncode == -signal.SIGKILL
