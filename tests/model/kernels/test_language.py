"""Whether Triton and QuACK are there."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from minifoundation.model.kernels import gated


@pytest.mark.parametrize(("name", "module"), [("triton", "language"), ("quack", "gated")])
def test_a_folder_of_that_name_is_not_the_package(tmp_path: Path, name: str, module: str) -> None:
    """As of a clone beside which a program is started: Python takes any folder on its path for a package."""
    (tmp_path / name).mkdir()
    program = f"from minifoundation.model.kernels import {module}; print({module}.INSTALLED)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == str(find_spec(name) is not None)


def test_quack_is_known_by_the_module_that_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quack").mkdir()
    (tmp_path / "quack" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "quack", raising=False)
    assert not gated._installed()
    (tmp_path / "quack" / "gemm_interface.py").touch()
    assert gated._installed()
