"""The program, by any of its names: ``minifoundation``, ``python -m minifoundation`` and ``python -m src.cli`` begin here.

Imports only what Python has already loaded: the rest takes seconds, in which a signal can come.
"""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

COMMANDS = f"{__file__.removesuffix('__main__.py')}commands/"
AGAIN_SECONDS = 0.1
"""Until a signal that came in an import is looked at again."""


class Interrupt:
    """A handler for the signals that end a program: what is begun is cleared away, as after Ctrl-C. A second one ends it at once."""

    def __init__(self) -> None:
        self._come = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGALRM
        importing, begun = _where(frame)
        # An import may turn an exception into another or drop it. Before a command has begun nothing is to be cleared away; later it waits.
        if (self._come and not again) or (importing and not begun):
            if int(os.environ.get("LOCAL_RANK", 0)) == 0:
                os.write(2, b"stopped\n")
            os._exit(130)
        self._come = True
        if not importing:
            raise KeyboardInterrupt
        signal.signal(signal.SIGALRM, self)
        signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)


def _where(frame: FrameType | None) -> tuple[bool, bool]:
    """Return whether something is being imported, and whether a function of a command is at work."""
    importing = begun = False
    while frame is not None:
        code = frame.f_code
        importing |= code.co_filename == "<frozen importlib._bootstrap>"
        begun |= code.co_filename.startswith(COMMANDS) and code.co_name != "<module>"
        frame = frame.f_back
    return importing, begun


def run() -> NoReturn:
    """Run the command line of this process, and leave with its exit code."""
    interrupt = Interrupt()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, interrupt)
    try:
        from minifoundation import cli
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed; run: pip install -r requirements.txt")
    cli.run()


if __name__ == "__main__":
    run()
