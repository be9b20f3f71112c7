"""Programs written by a model, run where they can do little: the scoring of HumanEval and MBPP.

A fresh ``python -I -S`` for each program: empty environment, temporary folder, limits on CPU time, memory and file size,
its own session that is killed as a group when the time is out. Where the system has them: no further processes (seccomp), own
network and process namespaces (``unshare``), no writing outside the folder (Landlock). What holds on this machine is
measured and said in the report. A program can still read what this user may read.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from minifoundation.errors import UserError

SECONDS = 15
"""Of processor time, and twice as many on the clock: a reference solution of MBPP (task 123) takes 3 to 6."""
MEMORY = 1 << 30
_GUARD = Path(__file__).with_name("guard.py").read_text(encoding="utf-8")
_NAMESPACES = ("--user", "--map-root-user", "--net", "--pid", "--fork", "--kill-child")
_PROBES = {
    "no further processes": "import os\ntry:\n    os.fork()\nexcept OSError:\n    pass\nelse:\n    raise SystemExit(1)",
    "no network": "import socket\nassert [name for _, name in socket.if_nameindex()] == ['lo']",
    "no writing outside the folder": "import os\nplace = os.getcwd() + '-outside'\ntry:\n    open(place, 'w').close()\n"
    "except PermissionError:\n    pass\nelse:\n    os.remove(place)\n    raise SystemExit(1)",
}


@dataclass(frozen=True)
class Sandbox:
    """A way of confining a program: the command line put before its Python."""

    prefix: tuple[str, ...]

    def passes(self, program: str, *, seconds: int = SECONDS) -> bool:
        """Return whether ``program`` runs to its end within ``seconds`` of processor time, or twice that on the clock, without an error."""
        status = 64 + secrets.randbelow(48)  # apart from what Python, a shell or a signal exits with
        with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder:
            process = subprocess.Popen(
                [*self.prefix, os.path.realpath(sys.executable), "-I", "-S", "-c", _GUARD, str(seconds), str(MEMORY), str(status)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                start_new_session=True,
            )
            try:
                with suppress(subprocess.TimeoutExpired):
                    process.communicate(program.encode("utf-8", "replace"), timeout=2 * seconds + 1)
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return process.returncode == status

    def description(self) -> str:
        """Return what confines a program here, each part tried out."""
        confined = [f"{name}: {'yes' if self.passes(probe) else 'NO'}" for name, probe in _PROBES.items()]
        return (
            f"python -I -S, empty environment, temporary folder, {SECONDS} s of processor time, {MEMORY >> 20} MiB; {', '.join(confined)}"
        )


@cache
def sandbox() -> Sandbox:
    """Return the strictest sandbox that works here.

    Raises:
        UserError: not even a plain one can run a program.
    """
    unshare = shutil.which("unshare")
    for prefix in ((unshare, *_NAMESPACES), ()) if unshare else ((),):
        found = Sandbox(prefix)
        if found.passes("assert 1 + 1 == 2"):
            return found
    raise UserError("--allow_code_exec", f"{sys.executable} does not start in the sandbox", "run eval on Linux, or without the flag")
