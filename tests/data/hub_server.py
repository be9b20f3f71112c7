"""A server on loopback that speaks as much of the Hugging Face Hub as its real client needs to read data sets, and fails on demand.

Files lie in ``<root>/<org>/<name>/<version>/…``; each version is a commit, the last in the order of names is ``main``. The newest
version of each is also there for any HTTP client, at ``<endpoint>/web/<org>/<name>/…``.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True)
class Fault:
    """What goes wrong with the requests for a data set, each of them ``times`` times before it is answered well."""

    kind: Literal["none", "drop", "stall", "429", "503", "truncate", "gated"]
    """Nothing; half of the body and then the end, or silence; an HTTP status; half of the body, said to be all; for members only."""
    times: float = 1
    after: int = 0
    """Requests for content that are answered well before that."""
    retry_after: str = "0"
    """What is sent with a 429."""
    ranged: bool = True
    """Whether ranges are sent, and not always the whole."""
    everywhere: bool = False
    """Listings too, not the content of files alone."""


@dataclass
class Hub:
    """The running server."""

    root: Path
    faults: Mapping[str, Fault]
    endpoint: str = ""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and range of each request, in order."""
    failed: Counter[str] = field(default_factory=Counter)
    """Requests spoilt, by data set."""
    seen: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    closing: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to take this for the Hub, and to lose no time with others."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.root / ".cache"),
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def versions(self, repository: str) -> dict[str, Path]:
        """Return the folder of each commit of a data set, the newest last."""
        folder = self.root / repository
        folders = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
        return {hashlib.sha1(f"{repository}/{path.name}".encode()).hexdigest(): path for path in folders}

    def fault(self, repository: str, request: tuple[str, str, str], *, content: bool) -> Fault | None:
        """Return what goes wrong with this request."""
        fault = self.faults.get(repository)
        if fault is None or not (content or fault.everywhere) or fault.kind in ("none", "gated"):
            return None
        with self.lock:
            self.seen[request] += 1
            self.seen[(repository, "", "")] += 1
            if self.seen[request] > fault.times or self.seen[(repository, "", "")] <= fault.after:
                return None
            self.failed[repository] += 1
            return fault


@contextmanager
def hub(root: Path, faults: Mapping[str, Fault] | None = None) -> Iterator[Hub]:
    """Run the server for the data sets below ``root``; ``faults`` goes by data set, ``org/name``."""
    state = Hub(root, faults or {})

    class Bound(Answers):
        hub = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
    server.daemon_threads = True
    state.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state
    finally:
        state.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class Answers(BaseHTTPRequestHandler):
    """Answers to requests."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Keep the output of the tests clean."""

    def handle(self) -> None:
        """A client may hang up at any time."""
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def do_HEAD(self) -> None:
        """Answer without the body."""
        self.do_GET()

    def do_POST(self) -> None:
        """Answer the question after several paths."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        self._answer(parse_qs(body).get("paths", []))

    def do_GET(self) -> None:
        """Answer any other question."""
        self._answer([])

    def _answer(self, paths: list[str]) -> None:
        path = unquote(urlsplit(self.path).path)
        request = (self.command, self.path, self.headers.get("Range", ""))
        with self.hub.lock:
            self.hub.requests.append(request)
        found = re.fullmatch(r"/(?:api/)?(datasets|web)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|resolve)/([^/]+))?(?:/(.*))?", path)
        area, repository, verb, revision, inner = found.groups() if found else ("", "", None, None, None)
        versions = self.hub.versions(repository) if repository else {}
        commit = list(versions)[-1] if versions and revision in (None, "main") else revision
        content = area == "web" or verb == "resolve"
        lasting = self.hub.faults.get(repository, Fault("none"))
        fault = self.hub.fault(repository, request, content=content and self.command == "GET" and not path.endswith(".md"))
        if commit not in versions:
            self._error(404, "RevisionNotFound" if versions else "RepoNotFound")
        elif fault and fault.kind in ("429", "503"):
            self._error(int(fault.kind), "", {"Retry-After": fault.retry_after} if fault.kind == "429" else {})
        elif lasting.kind == "gated" and (content or inner == "auth-check"):
            self._error(401, "GatedRepo")
        elif content:
            self._file(versions[commit] / (inner or ""), commit, fault, ranged=lasting.ranged)
        else:
            self._listing(
                versions[commit], verb, inner or "", paths, fault, {"id": repository, "sha": commit, "gated": lasting.kind == "gated"}
            )

    def _listing(self, folder: Path, verb: str | None, inner: str, paths: list[str], fault: Fault | None, about: dict[str, object]) -> None:
        found: object = about
        if verb == "tree":
            deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
            start = folder / inner
            found = [_entry(folder, entry) for entry in sorted(start.rglob("*") if deep else start.iterdir())] if start.is_dir() else None
        elif verb == "paths-info":
            found = [_entry(folder, folder / name) for name in paths if (folder / name).exists()]
        if found is None:
            self._error(404, "EntryNotFound")
        else:
            self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"}, fault)

    def _file(self, path: Path, commit: str, fault: Fault | None, *, ranged: bool) -> None:
        if not path.is_file():
            self._error(404, "EntryNotFound")
            return
        raw = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(raw).hexdigest()}"', "X-Repo-Commit": commit}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not ranged or wanted is None:
            self._send(200, raw, headers, fault)
            return
        start, stop = int(wanted[1]), min(int(wanted[2] or len(raw)) + 1, len(raw))
        if start < len(raw):
            self._send(206, raw[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(raw)}"}, fault)
        else:
            self._error(416, "")

    def _error(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, b"", {**(headers or {}), **({"X-Error-Code": code, "X-Error-Message": code} if code else {})}, None)

    def _send(self, status: int, raw: bytes, headers: Mapping[str, str], fault: Fault | None) -> None:
        half = raw[: len(raw) // 2]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(half if fault and fault.kind == "truncate" else raw)))
        self.end_headers()
        if self.command == "HEAD":
            return
        assert isinstance(self.wfile, io.BufferedIOBase)
        self.wfile.write(half if fault else raw)
        self.wfile.flush()
        if fault and fault.kind == "stall":
            self.hub.closing.wait(30)
        if fault and fault.kind != "truncate":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)


def _entry(folder: Path, path: Path) -> dict[str, object]:
    name = path.relative_to(folder).as_posix()
    oid = hashlib.sha1(name.encode()).hexdigest()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": oid, "size": 0}
    return {"type": "file", "path": name, "oid": oid, "size": path.stat().st_size}
