"""A machine that is not there, for tests of what is decided by it."""

from __future__ import annotations

from dataclasses import dataclass

from minifoundation.runtime import Machine


@dataclass(frozen=True)
class Pretended(Machine):
    """A CPU that says it is a GPU."""

    @property
    def is_cuda(self) -> bool:
        return True

    def forget(self) -> None:
        pass

    def synchronize(self) -> None:
        pass
