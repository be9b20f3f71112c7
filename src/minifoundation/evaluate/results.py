"""What an evaluation comes to, and the folder it is kept in, written anew after each task so that a killed evaluation goes on.

``results.json`` holds settings, versions, hashes and one row an outcome; ``items/<label>.jsonl`` a line for each document: what was
answered and what that scored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, field_validator

from minifoundation.errors import UserError
from minifoundation.evaluate.protocols import Row
from minifoundation.evaluate.requests import Request

RESULTS = "results.json"
IDENTITY = ("model", "dtype", "engine", "limit", "data", "versions")
"""What must be equal for an evaluation to go on."""


@dataclass
class Outcome:
    """What one request came to: a score with its standard error, or the reason why there is none.

    Attributes:
        is_share: the score is the mean of what documents have between 0 and 1, and shown in percent; a perplexity, say, is not.
        n: documents that were scored.
        truncated: requests that were longer than the model's context and lost their beginning.
        items: a line for each document, written to ``items/``.
        samples: lm-eval's logged documents by task, with their prompts; not written.
        raw: everything else that lm-eval returned.
    """

    request: Request
    label: str
    score: float | None = None
    stderr: float | None = None
    is_share: bool = True
    n: int = 0
    shots: int = 0
    metric: str = ""
    measure: str = ""
    also: dict[str, float] = field(default_factory=dict)
    truncated: int = 0
    requests: int = 0
    seconds: float = 0.0
    not_run: str | None = None
    raw: dict[str, Any] = field(default_factory=dict)
    items: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def protocol(self) -> str:
        return f"{self.shots}-shot, {self.measure}"

    @property
    def scale(self) -> float:
        """What a score is multiplied by where it is shown."""
        return 100.0 if self.is_share else 1.0

    @property
    def is_sample(self) -> bool:
        """Whether fewer documents were read than the benchmark has."""
        return self.n < (self.request.row.documents or 0)


@dataclass(frozen=True)
class Folder:
    """Where one evaluation is kept, and the outcomes of it that are there already."""

    path: Path
    facts: dict[str, Any]
    done: dict[str, list[Outcome]]
    """By the label of their request."""

    def write(self, outcomes: Sequence[Outcome], *, complete: bool) -> None:
        """Write ``results.json`` and the items of ``outcomes``, each whole or not at all."""
        for outcome in outcomes:
            if outcome.items:
                replace_text(self.path / "items" / f"{file_name(outcome.label)}.jsonl", _lines(outcome.items))
        rows = [_row(outcome) for outcome in outcomes]
        content = {"complete": complete, **self.facts, "rows": rows}
        replace_text(self.path / RESULTS, json.dumps(content, indent=1, default=_plain, ensure_ascii=False) + "\n")


def folder_for(wanted: Path, facts: dict[str, Any], requests: Sequence[Request]) -> Folder:
    """Return the folder to write to: ``wanted``, or ``wanted-2``, ``wanted-3`` ... when finished or different results are there.

    A folder of the same model, data, settings and versions is gone on with when something is left to do there, because it was killed, could
    not run or was not asked for, and no score would be lost. One in which no task could run is used again for anything.
    """
    path, number = wanted, 1
    asked = {request.label for request in requests}
    while (path / RESULTS).exists():
        kept = read_results(path)
        scored = {row["request"] for row in kept["rows"] if not row["not_run"]}
        same = all(kept.get("identity", {}).get(name) == facts["identity"][name] for name in IDENTITY)
        if same and scored <= asked and (scored < asked or not kept["complete"]):
            _make(path)
            return Folder(path, facts, _done(path, kept["rows"], requests))
        if kept["complete"] and not scored:
            break
        number += 1
        path = wanted.with_name(f"{wanted.name}-{number}")
    if path.exists() and not path.is_dir():
        raise UserError("--out_dir", f"{path} is a file", "give the name of a folder")
    _make(path)
    return Folder(path, facts, {})


def _make(path: Path) -> None:
    """Make the folder now: that it cannot be written should not show after the first task."""
    try:
        (path / "items").mkdir(parents=True, exist_ok=True)
        (path / "items" / ".part").touch()
        (path / "items" / ".part").unlink()
    except OSError as error:
        raise UserError("--out_dir", f"{path} cannot be written ({error.strerror})", "give another folder") from None


def read_results(folder: Path) -> dict[str, Any]:
    """Return the content of the folder's ``results.json``.

    Raises:
        UserError: there is none, or it is no result of ``eval``.
    """
    path = folder / RESULTS
    try:
        text = path.read_text(encoding="utf-8")
        _Results.model_validate_json(text)
    except FileNotFoundError:
        inner = folder / "eval"  # that of a model, whose evaluation lies in it
        remedy = f"give {inner}" if (inner / RESULTS).is_file() else "give a folder that eval wrote"
        raise UserError(str(folder), f"holds no {RESULTS}", remedy) from None
    except NotADirectoryError:
        remedy = f"give {folder.parent}" if folder.name == RESULTS else "give a folder that eval wrote"
        raise UserError(str(folder), "is a file, not a folder", remedy) from None
    except ValueError:
        raise UserError(
            str(path), "is not a result of eval of this version", "remove the folder, or run eval with another --out_dir"
        ) from None
    found: dict[str, Any] = json.loads(text)
    return found


class _Part(BaseModel):
    """What is read of ``results.json``; what else stands there is let be."""

    model_config = ConfigDict(strict=True)


class _Model(_Part):
    path: str
    parameters: int
    dtype: str
    device: str
    max_length: int
    sha256: dict[str, str]
    engine: str | None = None
    trained_tokens: int | None = None
    imported_from: str | None = None
    tokens_since_import: int | None = None


class _Settings(_Part):
    model_path: str
    tasks: str
    limit: int


class _Versions(_Part):
    lm_eval: str


class _Row(_Part):
    """The fields of ``Outcome`` that are written, and no others."""

    model_config = ConfigDict(strict=True, extra="forbid")

    request: str
    label: str
    score: float | None
    stderr: float | None
    is_share: bool = True
    n: int
    shots: int
    metric: str
    measure: str
    also: dict[str, float]
    truncated: int
    requests: int
    seconds: float
    not_run: str | None
    row: dict[str, Any]
    lm_eval: dict[str, Any]

    @field_validator("row")
    @classmethod
    def _of_this_version(cls, value: dict[str, Any]) -> dict[str, Any]:
        if unknown := value.keys() - Row.__dataclass_fields__.keys():
            raise ValueError(f"unknown: {unknown}")
        TypeAdapter(Row).validate_python(value)
        return value


class _Results(_Part):
    complete: bool
    settings: _Settings
    model: _Model
    versions: _Versions
    sandbox: str | None
    rows: list[_Row]


def read_items(folder: Path, label: str) -> list[dict[str, Any]]:
    """Return the documents of an outcome as they were scored; none where they were not kept.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / "items" / f"{file_name(label)}.jsonl"
    if not path.exists():
        return []
    try:
        with path.open(encoding="utf-8") as file:  # str.splitlines would cut at U+2028 and U+0085 too, which an answer may hold
            return [json.loads(line) for line in file]
    except ValueError:
        raise UserError(str(path), "is damaged", "run eval again, or remove the folder") from None


def file_name(label: str) -> str:
    """Return ``label`` as the name of a file."""
    return re.sub(r"[^\w.@=-]+", "_", label)


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _done(path: Path, rows: Iterable[dict[str, Any]], requests: Sequence[Request]) -> dict[str, list[Outcome]]:
    asked = {request.label: request for request in requests}
    done: dict[str, list[Outcome]] = {}
    for row in rows:
        request = asked.get(row["request"])
        if request is None or row["not_run"]:
            continue
        outcome = restored(row)
        documents = request.row.documents or outcome.request.row.documents  # of a task without a row here it was counted
        outcome.request = replace(request, row=replace(request.row, documents=documents))
        outcome.items = read_items(path, row["label"])
        done.setdefault(row["request"], []).append(outcome)
    return done


def restored(row: dict[str, Any]) -> Outcome:
    """Return the outcome of a row of ``results.json``, without its items."""
    fields = {name: value for name, value in row.items() if name not in ("request", "row", "lm_eval")}
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row["row"].items()}
    benchmark = Row(**values)
    return Outcome(Request(benchmark, row["shots"]), **fields, raw=row["lm_eval"])


def _row(outcome: Outcome) -> dict[str, Any]:
    fields = {name: value for name, value in vars(outcome).items() if name not in ("request", "items", "samples", "raw")}
    return {"request": outcome.request.label, **fields, "row": asdict(outcome.request.row), "lm_eval": outcome.raw}


def _lines(items: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(item, ensure_ascii=False, default=_plain) + "\n" for item in items)


def _plain(value: Any) -> Any:
    """Return numpy scalars as numbers, anything else that JSON does not know as text."""
    return value.item() if hasattr(value, "item") else str(value)
