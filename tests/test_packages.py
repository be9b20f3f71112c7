"""Whether a package is there: as Python's own import finds it, except that a mere folder is none, and that nothing is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from minifoundation.packages import installed


@pytest.mark.parametrize("name", ["torch", "torch.nn.functional", "json", "transformers.cli", "sys"])
def test_what_can_be_imported_is_installed(name: str) -> None:
    assert installed(name)


@pytest.mark.parametrize("name", ["no_such_package", "no_such_package.part", "torch.no_such_part", "json.decoder.deeper"])
def test_what_cannot_be_imported_is_not(name: str) -> None:
    assert not installed(name)


def test_a_package_is_known_by_the_part_that_is_used_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "some_kernels"
    monkeypatch.syspath_prepend(tmp_path)
    package.mkdir()
    assert find_spec("some_kernels") is not None and not installed("some_kernels")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    assert installed("some_kernels") and not installed("some_kernels.products")
    (package / "products.py").touch()
    assert installed("some_kernels.products") and "some_kernels" not in sys.modules


def test_a_package_that_is_imported_and_has_paths_for_text_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers when it has loaded a part of itself."""
    package = tmp_path / "some_models"
    package.mkdir()
    (package / "__init__.py").write_text("from pathlib import Path\n__spec__.submodule_search_locations = [Path(__path__[0])]")
    (package / "llama.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "some_models", import_module("some_models"))
    assert installed("some_models.llama") and not installed("some_models.qwen")


def test_folders_beside_which_a_program_starts_are_no_kernel_libraries(tmp_path: Path) -> None:
    used = {"triton": "triton.language", "quack": "quack.gemm_interface", "flash_attn": "flash_attn.cute.interface"}
    for name in used:
        (tmp_path / name).mkdir()
    program = "from minifoundation.model.kernels import flash4, gated, language; "
    program += "print(language.INSTALLED, gated.INSTALLED, flash4.INSTALLED)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == [str(installed(module)) for module in used.values()]
