"""How a benchmark ends: its full results in docs/data/<name>.json, its figures as one line of JSON."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]


def machine() -> dict[str, str]:
    """Return what the figures were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "gpu": gpu,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
    }


def with_kept(name: str, results: list[dict[str, Any]], *, alike: Sequence[str]) -> list[dict[str, Any]]:
    """Return ``results`` after the rows of docs/data/<name>.json that were not measured again, each with the command it is from.

    Args:
        alike: the names whose values tell a row from others.
    """
    before = json.loads((ROOT / "docs" / "data" / f"{name}.json").read_text(encoding="utf-8"))
    again = {tuple(row.get(key) for key in alike) for row in results}
    kept = [row for row in before["results"] if tuple(row.get(key) for key in alike) not in again]
    return [{"command": before["machine"]["command"], "gpu": before["machine"]["gpu"], **row} for row in kept] + results


def finish(name: str, figures: dict[str, Any], *, results: Any, quick: bool) -> None:
    """Print ``figures`` as the last line; keep ``results`` with them in docs/data unless the run was a quick one."""
    if not quick:
        path = ROOT / "docs" / "data" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": machine(), "figures": figures, "results": results}, indent=1, ensure_ascii=False)
        path.write_text(text.replace(f"{ROOT}/", "") + "\n", encoding="utf-8")
    print(json.dumps({"benchmark": name, "quick": quick, **figures}), flush=True)
