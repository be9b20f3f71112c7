"""What a process may take of its machine: all of it, or what the limits of its container leave."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux tells the limits of the control group, of version 2, or of version 1 in a folder for each kind."""


def cores() -> int:
    """Return how many cores this process may use: those it is bound to, or fewer where its container has a share of their time."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(bound, math.ceil(_quota(CGROUP) or bound))


def _quota(cgroup: Path) -> float | None:
    """Return the cores' worth of time that a container may take, None without a limit (or for one that is not a container)."""
    with suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        return int(quota) / int(period)  # "max" is no number
    with suppress(OSError, ValueError):  # version 1
        quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    return None


def memory_bytes(limits: Path = CGROUP) -> int:
    """Return the memory of the machine, or what its container may take of it: beyond that the system kills.

    Args:
        limits: folder of the control group.
    """
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in (limits / "memory.max", limits / "memory" / "memory.limit_in_bytes"):  # versions 2 and 1
        with suppress(OSError, ValueError):  # "max" is no limit
            most = min(most, int(limit.read_text()))
    return most


def free_memory_bytes(limits: Path = CGROUP) -> int:
    """Return how much host memory can be had without swapping and within the limit of a container; all of it where nothing tells.

    Args:
        limits: folder of the control group.
    """
    free = memory_bytes(limits)
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        told = dict(line.split(":") for line in meminfo.read_text(encoding="ascii").splitlines())
        free = int(told["MemAvailable"].split()[0]) * 1024
    v2, v1 = ("memory.max", "memory.current", "inactive_file"), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for folder, (most, used, reclaimable) in ((limits, v2), (limits / "memory", v1)):
        with suppress(OSError, ValueError):  # "max" is no limit
            left = int((folder / most).read_text()) - int((folder / used).read_text())
            kinds = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            free = min(free, max(0, left + int(kinds.get(reclaimable, 0))))  # what it holds of files is given back first
    return free
