"""What torchrun tells the processes that it starts, in variables of the environment."""

from __future__ import annotations

import os

from minifoundation.errors import UserError


def world_size() -> int:
    """Return how many processes there are, 1 without torchrun.

    Raises:
        UserError: WORLD_SIZE is no number.
    """
    return number("WORLD_SIZE", without=1)


def number(name: str, *, without: int | None = None) -> int:
    """Return the variable ``name``, or ``without`` where it is not set or empty.

    Raises:
        UserError: it is no number, or has to be set.
    """
    text = os.environ.get(name) or (None if without is None else str(without))
    if text is None:
        said = f"is {os.environ['WORLD_SIZE']}, and {name} is not set"
        raise UserError("WORLD_SIZE", said, "start the processes with torchrun, or unset WORLD_SIZE")
    if not (text.isascii() and text.isdigit()):
        raise UserError(name, f"is {text!r}, which is no number", "start the processes with torchrun, or unset it")
    return int(text)
