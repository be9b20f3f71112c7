"""Which test items stand in the training text, and the scores on clean and dirty ones apart.

An item is dirty when one n-gram of words of any of its fields (question, choices, solution) is in the text, as in GPT-3 (arXiv:2005.14165,
appendix C, n = 13); n = 8 finds shorter and partly changed copies, and more by chance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from minifoundation.errors import UserError
from minifoundation.evaluate.ngrams import Index, Item

SIZES = (13, 8)


@dataclass(frozen=True)
class Split:
    """Scores of the items of one kind: mean and its standard error, None where there are too few, and their number."""

    score: float | None
    stderr: float | None
    n: int


@dataclass(frozen=True)
class Separated:
    """An outcome's score on clean and on dirty items."""

    share: float
    clean: Split
    dirty: Split
    short: int
    """Items whose fields all have fewer words than an n-gram: they count as clean."""


def fields_of(document: Any) -> Iterator[str]:
    """Yield every text in a document of a data set, however deep."""
    match document:
        case str():
            yield document
        case dict():
            for value in document.values():
                yield from fields_of(value)
        case list() | tuple():
            for value in document:
                yield from fields_of(value)


def items_of(name: str, tasks: dict[str, Any]) -> Iterator[Item]:
    """Yield the test items of lm-eval's ``tasks`` that make up the benchmark ``name``."""
    from lm_eval.utils import handle_non_serializable, hash_string

    for task_name, task in tasks.items():
        for document in task.eval_docs:
            content = json.dumps(document, indent=2, default=handle_non_serializable, ensure_ascii=False)
            yield Item(name, task_name, hash_string(content), tuple(dict.fromkeys(fields_of(document))))


def findings(items: Sequence[Item], indexes: Sequence[Index], seen: dict[int, npt.NDArray[np.bool_]]) -> list[dict[str, Any]]:
    """Return a row for each benchmark: how many items, and by n how many are too short and the hashes of the dirty ones."""
    coverage = {index.n: index.coverage(seen[index.n]) for index in indexes}
    rows = []
    for name in dict.fromkeys(item.label for item in items):
        own = [number for number, item in enumerate(items) if item.label == name]
        rows.append(
            {
                "benchmark": name,
                "items": len(own),
                "short": {str(n): int(np.isnan(share[own]).sum()) for n, share in coverage.items()},
                "dirty": {str(n): [items[number].doc_hash for number in own if share[number] > 0] for n, share in coverage.items()},
            }
        )
    return rows


def read_findings(path: Path) -> dict[str, Any]:
    """Return the content of a ``contamination.json``.

    Raises:
        UserError: there is none, or it is something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        _Findings.model_validate_json(text)
    except FileNotFoundError:
        raise UserError(str(path), "no such file", "write one with the command contamination") from None
    except IsADirectoryError:
        raise UserError(str(path), "is a folder", f"give the file: {path / 'contamination.json'}") from None
    except ValueError:
        raise UserError(str(path), "is not a result of the command contamination", "write it again") from None
    found: dict[str, Any] = json.loads(text)
    return found


class _Part(BaseModel):
    """What is read of ``contamination.json``; what else stands there is let be."""

    model_config = ConfigDict(strict=True)


class _Text(_Part):
    tokens: int


class _Benchmark(_Part):
    benchmark: str
    short: dict[Literal["13", "8"], int] = Field(min_length=len(SIZES))
    dirty: dict[Literal["13", "8"], list[str]] = Field(min_length=len(SIZES))


class _Findings(_Part):
    text: _Text
    benchmarks: list[_Benchmark]


def separated(items: Sequence[dict[str, Any]], row: dict[str, Any], n: int, *, aggregate: str) -> Separated:
    """Return the score on clean and on dirty items.

    Args:
        items: of an outcome, as ``eval`` keeps them.
        row: of the benchmark, from ``findings``.
        aggregate: of the outcome: ``macro`` is the mean over its tasks, else that over items.
    """
    hashes = set(row["dirty"][str(n)])
    dirty = [item for item in items if item["doc_hash"] in hashes]
    clean = [item for item in items if item["doc_hash"] not in hashes]
    return Separated(len(dirty) / max(1, len(items)), _split(clean, aggregate), _split(dirty, aggregate), row["short"][str(n)])


def _split(items: Sequence[dict[str, Any]], aggregate: str) -> Split:
    if not items:
        return Split(None, None, 0)
    scores: dict[str, list[float]] = {}
    for item in items:
        scores.setdefault(item["task"] if aggregate == "macro" else "", []).append(float(item["score"]))
    errors = [stdev(part) / math.sqrt(len(part)) if len(part) > 1 else math.nan for part in scores.values()]
    error = math.sqrt(sum(error**2 for error in errors)) / len(errors)
    return Split(fmean(map(fmean, scores.values())), None if math.isnan(error) else error, len(items))
