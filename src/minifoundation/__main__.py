"""The program, by any of its names: ``minifoundation``, ``python -m minifoundation`` and ``python -m src.cli`` begin here.

Imports only what Python has already loaded: the rest takes seconds, in which a signal can come.
"""

import os
import signal
import sys
from types import FrameType
from typing import NoReturn


class Interrupt:
    """A handler for the signals that end a program: what is begun is cleared away, as after Ctrl-C. A second one ends it at once."""

    def __init__(self) -> None:
        self._come = False

    def __call__(self, _number: int, frame: FrameType | None) -> None:
        # An import has nothing to clear away, and may turn an exception into another or drop it.
        if self._come or _is_importing(frame):
            if int(os.environ.get("LOCAL_RANK", 0)) == 0:
                os.write(2, b"stopped\n")
            os._exit(130)
        self._come = True
        raise KeyboardInterrupt


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


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
