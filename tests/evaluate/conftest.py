"""The tiny model, written and loaded once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.evaluate.tiny import write_tiny_model

if TYPE_CHECKING:
    from minifoundation.evaluate.harness import Model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Model:
    from minifoundation.evaluate.harness import load_model, quieten

    quieten()
    return load_model(str(tiny_folder), dtype="auto", device="cpu", rows=None)
