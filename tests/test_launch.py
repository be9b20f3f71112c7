"""What torchrun's variables say, and what is said of those that are not torchrun's."""

from __future__ import annotations

import pytest

from minifoundation import launch
from minifoundation.errors import UserError


@pytest.mark.parametrize(("value", "size"), [(None, 1), ("", 1), ("1", 1), ("16", 16)])
def test_processes_are_counted(monkeypatch: pytest.MonkeyPatch, value: str | None, size: int) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if value is not None:
        monkeypatch.setenv("WORLD_SIZE", value)
    assert launch.world_size() == size


def test_variables_of_another_launcher_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match=r"^WORLD_SIZE: is 2, and LOCAL_RANK is not set; start the processes with torchrun, or unset"):
        launch.number("LOCAL_RANK")
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match=r"^WORLD_SIZE: is 'two', which is no number; start the processes with torchrun"):
        launch.world_size()
