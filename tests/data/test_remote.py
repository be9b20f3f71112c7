from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from minifoundation.data import remote
from minifoundation.data.remote import RemoteFile, fetched, retried
from minifoundation.errors import UserError


class Answer(Exception):
    """What an HTTP client raises for a status."""

    def __init__(self, status: int, **headers: str) -> None:
        super().__init__(f"status {status}\nand a long story")
        self.status_code = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits asked for, on a clock that only they move."""
    slept: list[float] = []
    monkeypatch.setattr("minifoundation.data.remote.time.sleep", slept.append)
    monkeypatch.setattr("minifoundation.data.remote.time.monotonic", lambda: sum(slept))
    monkeypatch.setattr(remote, "_told", -remote.QUIET_SECONDS)
    return slept


def failing(*errors: Exception) -> Callable[[], str]:
    left = list(errors)

    def call() -> str:
        if left:
            raise left.pop(0)
        return "read"

    return call


def test_waits_grow_are_bounded_and_scattered(waits: list[float]) -> None:
    assert retried("file", failing(*[EOFError("short")] * 10)) == "read"
    bounds = [min(60, 2**attempt) for attempt in range(10)]
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))
    assert len({wait / bound for wait, bound in zip(waits, bounds, strict=True)}) == 10


@pytest.mark.parametrize("status", [429, 503])
def test_the_wait_that_a_server_asks_for_is_kept(waits: list[float], status: int) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=90))
    retried("file", failing(Answer(status, Retry_After="37"), Answer(status, Retry_After=date), Answer(status, Retry_After="soon")))
    assert waits[0] == 37
    assert 80 < waits[1] <= 90
    assert 2 <= waits[2] <= 4


@pytest.mark.parametrize(("patience", "total"), [(None, 600), (5, 5)])
def test_patience_ends(waits: list[float], patience: float | None, total: float) -> None:
    with pytest.raises(EOFError):
        retried("file", failing(*[EOFError("short")] * 1000), patience=patience)
    assert total - 60 - 1 < sum(waits) <= total


def test_giving_up_is_one_line_with_the_remedy(waits: list[float]) -> None:
    with pytest.raises(UserError) as error:
        fetched("hf://file", failing(*[Answer(503)] * 1000))
    line = "hf://file: cannot be read (HTTP 503 Service Unavailable); run the same command again; complete shards are kept"
    assert str(error.value) == line


@pytest.mark.parametrize(
    "error", [Answer(403), Answer(404), FileNotFoundError("no file"), PermissionError("no"), TypeError("a fault of ours")]
)
def test_what_cannot_get_better_is_not_tried_again(waits: list[float], error: Exception) -> None:
    with pytest.raises(type(error)):
        retried("file", failing(error))
    assert waits == []


def test_a_missing_file_that_only_hides_a_failure_is_tried_again(waits: list[float]) -> None:
    hidden = FileNotFoundError("http://host/file")
    hidden.__cause__ = TimeoutError("timed out")
    assert retried("file", failing(hidden)) == "read"


def test_retries_are_told_now_and_then(waits: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "LONGEST_WAIT_SECONDS", 2.0)
    retried("file", failing(*[Answer(429, Retry_After="2")] * 7))
    assert capsys.readouterr().err.splitlines() == ["file: HTTP 429 Too Many Requests; trying again in 2 s"] * 3


def test_a_file_is_asked_for_what_is_wanted_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 4000
    asked: list[tuple[int, int]] = []

    def block(url: str, start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return content[start:stop]

    monkeypatch.setattr(remote, "_block", block)
    monkeypatch.setattr(remote, "BEYOND_BYTES", 1000)
    file = RemoteFile("hf://file", len(content))
    file.seek(-10, 2)
    assert (file.read(100), file.read(1), file.tell()) == (content[-10:], b"", len(content))
    with remote.opened("hf://file", len(content), start=5, stop=30_000) as stream:
        assert stream.read(20_000) == content[5:20_005]
        assert stream.read(10_500) == content[20_005:30_505]
    assert asked == [(len(content) - 10, len(content)), (5, 30_000), (30_000, 31_000)]
