"""Headless Chromium, driven as its developer tools do: through a pipe, by the DevTools protocol."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
MISSING = "no Chromium (Debian: apt-get install chromium)"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe")


class Page:
    """A page that is open in a browser."""

    def __init__(self, reads: int, writes: int) -> None:
        self._reads = os.fdopen(reads, "rb", buffering=0)
        self._writes = os.fdopen(writes, "wb", buffering=0)
        self._calls = 0
        self._session: str | None = None
        self._rest = b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return what the browser answers."""
        self._calls += 1
        message: dict[str, Any] = {"id": self._calls, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._writes.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._calls:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, url: str, *, width: int, height: int, phone: bool) -> None:
        """Show ``url`` in a window of that size, and wait until it is there."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def value(self, expression: str) -> Any:
        """Return what a JavaScript expression gives."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 30.0) -> None:
        """Return when a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.value(expression):
            assert time.monotonic() < end, f"waited in vain for {expression}"
            time.sleep(0.05)

    def click(self, selector: str) -> None:
        """Click into the middle of an element."""
        middle = f"(({{left, top, width, height}}) => [left + width / 2, top + height / 2])({self._box(selector)})"
        x, y = self.value(middle)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Put ``text`` in place of what is in a field."""
        self.click(selector)
        self.value(f"document.querySelector('{selector}').select()")
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path) -> None:
        """Write what is shown as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._reads.close()
        self._writes.close()

    def _box(self, selector: str) -> str:
        return f"document.querySelector('{selector}').getBoundingClientRect()"

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = self._reads.read(1 << 16)
            assert more, "the browser has ended"
            self._rest += more
        message, self._rest = self._rest.split(b"\0", 1)
        read: dict[str, Any] = json.loads(message)
        return read


@contextmanager
def page(folder: Path) -> Iterator[Page]:
    """Give an empty page of a browser, whose profile is kept in ``folder``."""
    assert CHROMIUM is not None
    (to_read, its_writes), (its_reads, to_write) = os.pipe(), os.pipe()
    # It reads from 3 and writes to 4; from 10 on the pipes are out of the way of these.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (its_reads, its_writes)]
    line = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}"]
    command = ["bash", "-c", f'exec "$0" "$@" 3<&{ends[0]} 4>&{ends[1]} 2>/dev/null', *line]
    browser = subprocess.Popen(command, pass_fds=ends)
    for end in (its_reads, its_writes, *ends):
        os.close(end)
    try:
        opened = Page(to_read, to_write)
        yield opened
        opened.close()
    finally:
        browser.kill()
        browser.wait()
