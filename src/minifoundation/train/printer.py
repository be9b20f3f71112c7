"""Lines for the person, above the progress bar."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tqdm import tqdm

from minifoundation.distributed import World

Say = Callable[[str], None]
"""Prints a line for the person."""


class Printer:
    """Prints on the first process only, above the progress bar."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __call__(self, line: str) -> None:
        if self.world.is_first:
            tqdm.write(line, file=sys.stderr)
