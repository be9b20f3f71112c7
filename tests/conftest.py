"""Stand-ins for the commands, and the marks that depend on the machine."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

COMMANDS = {
    "prepare": ("minifoundation.commands.prepare", "prepare"),
    "inspect": ("minifoundation.commands.inspect", "inspect"),
    "pretrain": ("minifoundation.commands.pretrain", "pretrain"),
    "longft": ("minifoundation.commands.longft", "longft"),
    "bench": ("minifoundation.commands.bench", "bench"),
    "export_hf": ("minifoundation.commands.export_hf", "export_hf"),
    "import_hf": ("minifoundation.commands.import_hf", "import_hf"),
    "eval": ("minifoundation.commands.eval", "evaluate"),
    "eval-data pull": ("minifoundation.commands.eval_data", "pull"),
    "eval-data check": ("minifoundation.commands.eval_data", "check"),
    "contamination": ("minifoundation.commands.contamination", "contamination"),
    "report": ("minifoundation.commands.report", "report"),
    "generate": ("minifoundation.commands.generate", "generate"),
    "serve": ("minifoundation.commands.serve", "serve"),
    "doctor": ("minifoundation.commands.doctor", "doctor"),
}


class Calls(list[tuple[str, Any, dict[str, Any]]]):
    """What the commands were called with: name, options, nested values; ``failure`` is raised instead when it is set."""

    failure: BaseException | None = None


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    made = Calls()
    stubs: dict[str, ModuleType] = {}
    for name, (module, function) in COMMANDS.items():
        stub = stubs.setdefault(module, ModuleType(module))

        def called(options: Any, values: dict[str, Any] | None = None, *, name: str = name) -> None:
            if made.failure is not None:
                raise made.failure
            made.append((name, options, values or {}))

        setattr(stub, function, called)
        monkeypatch.setitem(sys.modules, module, stub)
    return made


@pytest.fixture
def signals() -> Iterator[None]:
    """Have signals as a terminal gives them: under nohup, or in the background of a script, some are ignored, also by what is started."""
    meant: dict[signal.Signals, Any] = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in meant.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu = [item for item in items if "gpu" in item.keywords]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
