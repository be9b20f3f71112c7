"""Whether Triton is there."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path


def test_a_folder_of_that_name_is_not_triton(tmp_path: Path) -> None:
    """As of a clone beside which a program is started: Python takes any folder on its path for a package."""
    (tmp_path / "triton").mkdir()
    program = "from minifoundation.model.kernels import language; print(language.INSTALLED)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == str(find_spec("triton") is not None)
