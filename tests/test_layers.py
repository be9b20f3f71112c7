"""A module imports only from lower layers and its own folder (docs/architecture.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = "minifoundation"
ROOT = Path(__file__).parents[1] / "src" / PACKAGE

LAYERS = (
    {"errors", "wording", "packages", "container"},
    {"launch"},
    {"config", "distributed", "lock", "hf_folder"},
    {"model", "data", "evaluate", "runtime", "checkpoint"},
    {"train", "export", "report"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts}
BLIND = {"model": {"distributed"}, "data": {"distributed"}, "evaluate": {"distributed"}, "report": {"distributed"}, "cli": {"distributed"}}
"""What a part does not see although it lies lower: models, data and benchmarks know no process."""

MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(source: str) -> set[str]:
    """Return the parts of the package that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"{node.module}.{alias.name}" if node.module == PACKAGE else str(node.module) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE}.")}
    return found - {"__version__"}


def faults(part: str, source: str) -> list[str]:
    higher = [other for other in imports(source) if other != part and HEIGHT[other] >= HEIGHT[part]]
    return sorted([*higher, *(imports(source) & BLIND.get(part, set()))])


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_below(path: Path) -> None:
    assert faults(part_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("part", "source", "expected"),
    [
        ("model", "from minifoundation.train.step import train_step", ["train"]),
        ("model", "from minifoundation.data import loader", ["data"]),
        ("model", "from minifoundation import distributed", ["distributed"]),
        ("data", "def f():\n    import minifoundation.commands.prepare", ["commands"]),
        ("train", "from minifoundation import config, runtime", []),
        ("model", "from minifoundation.model.rope import rotary", []),
    ],
)
def test_a_breach_is_seen(part: str, source: str, expected: list[str]) -> None:
    assert faults(part, source) == expected


HEAVY = {"torch", "transformers", "datasets", "lm_eval", "numpy", "sentencepiece"}


@pytest.mark.parametrize("path", [path for path in MODULES if part_of(path) in ("errors", "config", "cli")], ids=lambda path: path.name)
def test_the_first_modules_load_nothing_heavy(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    loaded = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    loaded |= {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not loaded & HEAVY
