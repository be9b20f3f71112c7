"""Kernel libraries without what they would load for nothing, with packages made up for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LIBRARY = """
import sys
import warnings
import torch

try:
    import jax
except ImportError:
    jax = None

def twice(x):
    return 2 * x

doubled = torch.compile(twice, dynamic=False, recompile_limit=64)

@torch.compile(dynamic=True)
def tripled(x):
    warnings.warn("Argument aux_data (position 17) cannot be converted to a JitArgument for function 'f'. Its type is not supported.")
    return 3 * x
"""
PROGRAM = """
import sys
import torch
from minifoundation.model.kernels.libraries import load
real = torch.compile
library = load("some_kernels.products")
assert library is load("some_kernels.products") is sys.modules["some_kernels.products"]
assert library.jax is None and library.doubled is library.twice and library.tripled(2) == 6
assert torch.compile is real and "torch._inductor.compile_fx" not in sys.modules
import jax
assert jax.there
sys.modules.pop("some_kernels.products")
assert load("some_kernels.products").jax is jax
try:
    load("some_kernels.nothing")
except ModuleNotFoundError:
    assert torch.compile is real and sys.modules["jax"] is jax
    print("done")
"""


def test_a_library_is_loaded_without_jax_and_inductor_which_stay_to_be_had(tmp_path: Path) -> None:
    (tmp_path / "some_kernels").mkdir()
    (tmp_path / "some_kernels" / "__init__.py").touch()
    (tmp_path / "some_kernels" / "products.py").write_text(LIBRARY)
    (tmp_path / "jax.py").write_text("there = True")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
