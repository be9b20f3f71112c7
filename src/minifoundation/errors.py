"""What a person did that cannot work: one line with the setting or file, its value and the remedy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self


def one_line(text: str) -> str:
    """Return ``text`` with line breaks and what else cannot be shown spelled out: names and values of files can hold any character."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text)


class UserError(Exception):
    """Raised for anything the person at the keyboard can mend; the command prints it as one line and exits with code 2.

    Args:
        where: the setting (its dotted name or flag) or the file at fault.
        problem: what is wrong, with the value that was found.
        remedy: what to do or type.
    """

    told: bool | None = None
    """Whether another process prints the same line; None where the processes have not spoken yet."""

    def __init__(self, where: str, problem: str, remedy: str) -> None:
        self.where = where
        self.problem = problem
        self.remedy = remedy
        super().__init__(one_line(f"{where}: {problem}; {remedy}"))

    def __reduce__(self) -> tuple[type[Self], tuple[str, str, str], dict[str, Any]]:
        """Let it come back from a worker process: by default pickle would rebuild it from the one line."""
        return type(self), (self.where, self.problem, self.remedy), self.__dict__


def refuse_unwritable(where: str, path: Path, folder: Path, remedy: str) -> None:
    """Refuse ``path`` now if ``folder``, which is to be made if need be, cannot hold it: that should not show after hours of work."""
    above = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        why = "may not be written to" if above.is_dir() else "is not a folder"
        raise UserError(where, f"{path} cannot be written: {above} {why}", remedy)


class Interrupted(Exception):
    """Work that was broken off by hand, with what is complete kept; carries the line that says how to go on."""

    told: bool | None = None
    """As of ``UserError``."""


class Stopped(Exception):
    """A training run that was told to stop (a signal, a time limit) and saved itself; carries the line that goes on with it."""

    told: bool | None = None
    """As of ``UserError``."""
