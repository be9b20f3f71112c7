"""``run.json``: where a run came from. Each start of it with its command line, versions, state of the code and machine."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from minifoundation import __version__
from minifoundation.checkpoint import write_whole
from minifoundation.config import REPOSITORY
from minifoundation.distributed import World
from minifoundation.runtime import Machine

RUN = "run.json"
PACKAGES = ("torch", "numpy", "safetensors", "sentencepiece", "datasets", "triton", "torchao", "flash-attn-4")


def typed(world: World, **options: object) -> str:
    """Return the command line that started this process with ``options`` set to other values: ready to be typed.

    Args:
        options: by their flags, ``resume="auto"``; what the line says of the same settings, in either spelling, is left out.
    """
    given = sys.argv[1:]
    leaves = {name.rsplit(".", 1)[-1] for name in options}
    kept: list[str] = []
    skip = False
    for part in given:
        if skip:
            skip = False
            continue
        name = part.split("=", 1)[0]
        if name.startswith("--") and name[2:].rsplit(".", 1)[-1] in leaves:
            skip = "=" not in part
            continue
        kept.append(part)
    changed = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return shlex.join(without_secrets(word) for word in [*_program(world), *kept, *changed])


def _program(world: World) -> list[str]:
    before = sys.orig_argv[: len(sys.orig_argv) - len(sys.argv[1:])]
    module = before[before.index("-m") + 1 :] if "-m" in before else []
    if world.size > 1 and module:
        nodes = ["--nnodes", str(world.nodes)] if world.nodes > 1 else []
        return ["torchrun", *nodes, "--nproc_per_node", str(world.local_size), "-m", *module]
    if module:
        return [before[0], "-m", *module]
    script = Path(sys.argv[0])
    return [script.name] if shutil.which(script.name) else before


def without_secrets(text: str) -> str:
    """Return ``text`` with user names, passwords and tokens in addresses left out."""
    return re.sub(r"(?<=://)[^/@\s]+@", "***@", text)


def record_start(out_dir: Path, world: World, machine: Machine, *, step: int) -> None:
    """Add this start of the run to ``run.json``; a file that cannot be read is begun anew."""
    path = out_dir / RUN
    try:
        starts = list(json.loads(path.read_text(encoding="utf-8"))["starts"])
    except (OSError, ValueError, TypeError, KeyError):
        starts = []
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "command": typed(world),
        "folder": str(Path.cwd()),
        "versions": versions(),
        "code": code(),
        "hardware": hardware(world, machine),
    }
    write_whole(path, json.dumps({"starts": [*starts, start]}, indent=1).encode())


def versions() -> dict[str, str | None]:
    """Return the versions of this package, Python and what it computes with; None is not installed."""
    found: dict[str, str | None] = {"minifoundation": __version__, "python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"torch": torch.__version__}  # with the build, +cu130, which the package's own version leaves out


def code() -> dict[str, Any] | None:
    """Return the commit of the clone this package runs from, and which files differ from it; None outside a clone."""
    if not (REPOSITORY / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no").splitlines()
        return {"commit": git("rev-parse", "HEAD"), "changed": [line.split(maxsplit=1)[-1] for line in changed]}
    except (OSError, subprocess.SubprocessError):
        return None


def hardware(world: World, machine: Machine) -> dict[str, Any]:
    """Return what the run computes on."""
    return {
        "host": socket.gethostname(),
        "system": platform.platform(),
        "device": machine.name,
        "memory_gib": round(machine.memory_bytes / 2**30, 1),
        "driver": driver_version(),
        "processes": world.size,
        "cores": os.cpu_count(),
    }


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, None where there is none."""
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?(\d+\.\d[\d.]*)", path.read_text(encoding="utf-8")) if path.exists() else None
    return found[1] if found else None
