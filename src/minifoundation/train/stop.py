"""Being told to stop: signals and a time limit."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from tqdm import tqdm

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C; what systems, schedulers and torchrun send before they kill; a terminal that closes; Slurm's ``--signal=USR1@60``."""

TOGETHER = 2.0
"""Seconds in which signals are one: a scheduler tells every process of a job, torchrun among them, which tells its own once more."""


class Stop:
    """Told by a signal, or by ``max_hours`` since it was made.

    While ``nothing_to_save`` a signal raises KeyboardInterrupt where the process stands, be it in preparing data or compiling. Later the
    first one has the loop save after its step, and a second one raises, which comes more than ``TOGETHER`` after it.
    """

    def __init__(self, max_hours: float | None = None) -> None:
        self.signal: str | None = None
        self._told = -math.inf
        self.nothing_to_save = True
        self._deadline = None if max_hours is None else time.monotonic() + 3600 * max_hours

    @property
    def asked(self) -> bool:
        """Whether to stop."""
        return self.signal is not None or self._out_of_time

    @property
    def reason(self) -> str:
        """What told to stop."""
        return self.signal or ("train.max_hours" if self._out_of_time else "another process was told to stop")

    @property
    def _out_of_time(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if time.monotonic() < self._told + TOGETHER:
            return
        again, self._told = self.signal is not None, time.monotonic()
        self.signal = signal.Signals(number).name
        if again or self.nothing_to_save:
            raise KeyboardInterrupt
        tqdm.write(f"{self.signal}: saving after this step (once more to stop at once)")


@contextmanager
def stop_on_signals(max_hours: float | None = None) -> Iterator[Stop]:
    """Yield a flag that the signals set, and put the former handlers back at the end."""
    stop = Stop(max_hours)
    under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    former = {number: signal.signal(number, stop) for number in SIGNALS if not (number == signal.SIGHUP and under_nohup)}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
