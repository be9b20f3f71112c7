"""The list of tasks a person asks for: suites, files with a task a line, names separated by commas.

A line is ``name``, with ``:shots`` behind it where the shots are others than the row's, then ``metric=``, ``aggregate=`` and ``limit=``
where those are to be others: ``hellaswag:0 metric=acc limit=2000``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from minifoundation.config import REPOSITORY
from minifoundation.errors import UserError
from minifoundation.evaluate.protocols import ROWS, Row

CONFIGS = REPOSITORY / "configs"
SUITES = {
    "quick": CONFIGS / "tasks" / "quick.txt",
    "paper": CONFIGS / "tasks.txt",
    "code": CONFIGS / "tasks" / "code.txt",
    "long": CONFIGS / "tasks" / "long.txt",
}
MACRO = ", macro"
"""Ends the measure of a row whose aggregate is macro."""
GRAMMAR = "write name, name:shots, and after it metric=, aggregate=micro or macro, limit=: hellaswag:0 metric=acc limit=1000"


@dataclass(frozen=True)
class Request:
    """A row asked for, with the shots to use.

    Attributes:
        row: as it is to be measured: its metric and aggregate are already those asked for.
        limit: documents of each task; 0 means all, and then the limit of the whole evaluation counts.
    """

    row: Row
    shots: int | None
    limit: int = 0

    @property
    def label(self) -> str:
        """The line that asks for this, as short as it can be: what tells requests apart in one evaluation."""
        usual = _usual(self.row.name)
        parts = [self.row.name if self.shots == usual.shots else f"{self.row.name}:{self.shots}"]
        parts += [f"metric={self.row.metric}"] if self.row.metric != usual.metric else []
        parts += [f"aggregate={self.row.aggregate}"] if self.row.aggregate != usual.aggregate else []
        parts += [f"limit={self.limit}"] if self.limit else []
        return " ".join(parts)

    @property
    def known(self) -> bool:
        """Whether it is a benchmark with a row here, and not any task of lm-eval."""
        return self.row.name in ROWS


def read_tasks(tasks: str) -> list[Request]:
    """Return what ``tasks`` asks for: the path of a file, or suites and tasks separated by commas, each once.

    ``#`` begins a comment. A name without a row becomes one that keeps lm-eval's own settings; whether it exists is for ``check_names`` to
    say, once the tasks of lm-eval are known.

    Raises:
        UserError: no such file, nothing in it, or a line that cannot be read.
    """
    requests = list(dict.fromkeys(_requests(tasks)))
    if not requests:
        raise UserError(
            "--tasks", f"{tasks!r} names no task", f"write one task a line, for example {next(iter(ROWS))}, or a suite: {', '.join(SUITES)}"
        )
    return requests


def _requests(tasks: str) -> Iterator[Request]:
    path = Path(tasks)
    if path.is_file():
        yield from _of_file(path)
    elif path.suffix == ".txt" or (len(path.parts) > 1 and "=" not in tasks):
        raise UserError("--tasks", f"{tasks}: no such file", "give a file with one task a line, or names separated by commas")
    else:
        for entry in tasks.split(","):
            name = entry.strip()
            if name in SUITES:
                yield from _of_file(SUITES[name])
            elif name:
                yield _request(name, "--tasks")


def _of_file(path: Path) -> Iterator[Request]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # Windows' editors begin a file with a mark
    except UnicodeDecodeError:
        raise UserError("--tasks", f"{path} is not text in UTF-8", "write one task a line, and save it as UTF-8") from None
    for number, line in enumerate(lines, 1):
        entry = line.split("#", 1)[0].strip()
        if entry:
            yield _request(entry, f"{path}:{number}")


def _usual(name: str) -> Row:
    """Return the row of a benchmark as it is measured when nothing else is asked for."""
    return ROWS.get(name) or Row(name, (), None, None, "as lm-eval", None)


def _request(entry: str, where: str) -> Request:
    first, *changes = entry.split()
    name, colon, shots = first.partition(":")
    row = _usual(name)
    if name in SUITES:
        remedy = f"give --tasks {name} alone, with --limit for fewer documents, or copy its lines from {SUITES[name]}"
        raise UserError(where, f"{entry!r}: {name} is a suite, not a task", remedy)
    if colon and not shots.isdecimal():
        raise UserError(where, f"{first!r} does not end in a number of shots", f"write {name}:5, or {name} alone")
    request = Request(row, int(shots) if colon else row.shots)
    for change in changes:
        key, _, value = change.partition("=")
        match key, value:
            case "metric", _ if value and not row.lengths:
                if value != row.metric:
                    measure = value + MACRO * (request.row.aggregate == "macro")
                    request = replace(request, row=replace(request.row, metric=value, measure=measure))
            case "aggregate", "micro" | "macro":
                measure = request.row.measure.removesuffix(MACRO) + MACRO * (value == "macro")
                request = replace(request, row=replace(request.row, aggregate=value, measure=measure))
            case "limit", _ if value.isdecimal() and int(value) > 0:
                request = replace(request, limit=int(value))
            case _:
                raise UserError(where, f"{change!r} in {entry!r} is not understood", GRAMMAR)
    return request


def check_names(requests: Sequence[Request], known: Sequence[str]) -> None:
    """Raise UserError with the nearest name when a request is neither a row nor among the ``known`` names of lm-eval."""
    for request in requests:
        name = request.row.name
        if not request.known and name not in known:
            near = get_close_matches(name, [*ROWS, *SUITES], n=1) or get_close_matches(name, known, n=1)
            raise UserError("--tasks", f"{name!r} is not a task", f"did you mean {near[0]}?" if near else f"choose from {', '.join(ROWS)}")
