"""A process of a run, forked from one that has everything imported: a life costs a second less than one that is started."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from minifoundation import cli, config
from minifoundation.config import RunConfig


class Life:
    """One process of a run, forked from this one."""

    def __init__(self, run_config: RunConfig, work: Path) -> None:
        self.out_dir = run_config.out_dir
        self._code: int | None = None
        yaml = work / f"{self.out_dir.name}.yaml"
        yaml.write_text(config.to_yaml(run_config), encoding="utf-8")
        self._log = work / f"{self.out_dir.name}.log"
        self._process = os.fork()
        if self._process:
            return
        code = 1
        try:
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            # A fork spoils torch's pool of threads, and it is made anew by whoever asks first: threads that do so at once can get none.
            torch.set_num_threads(torch.get_num_threads())
            code = cli.main(["pretrain", "--config", str(yaml), "--resume", "auto"])
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def exit_code(self) -> int | None:
        """Return the exit code, below 0 the signal that killed it; None while it lives."""
        if self._code is None:
            found, status = os.waitpid(self._process, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if found else None
        return self._code

    def ended(self, seconds: float = 300) -> int:
        """Return the exit code of a process that is to end."""
        deadline = time.monotonic() + seconds
        while (code := self.exit_code()) is None:
            assert time.monotonic() < deadline, "the process does not end"
            time.sleep(0.002)
        return code

    def until(self, true: Callable[[], bool], seconds: float, pause: float = 0.005) -> None:
        """Return when something is true, after some time, or when the process has ended."""
        deadline = time.monotonic() + seconds
        while not true() and time.monotonic() < deadline and self.exit_code() is None:
            if pause:
                time.sleep(pause)

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if the process lives."""
        if self.exit_code() is None:
            os.kill(self._process, number)

    @property
    def said(self) -> str:
        """The end of what the run has printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")[-2000:]

    @property
    def saving(self) -> bool:
        """Whether a checkpoint is being written, or was when the process was killed."""
        return any(self.out_dir.glob("step_*.part"))
