"""Outcomes and facts of an evaluation that nobody ran."""

from __future__ import annotations

from typing import Any

from minifoundation.evaluate.protocols import ROWS
from minifoundation.evaluate.requests import Request
from minifoundation.evaluate.results import Outcome

FACTS: dict[str, Any] = {
    "settings": {"model_path": "here", "tasks": "paper", "limit": 0},
    "model": {
        "path": "here",
        "parameters": 1000,
        "dtype": "float32",
        "device": "cpu",
        "engine": "transformers 5.23.0",
        "max_length": 64,
        "sha256": {},
    },
    "versions": {"lm_eval": "0.4.13"},
    "sandbox": None,
    "identity": {"model": {}, "dtype": "float32", "engine": "transformers 5.23.0", "limit": 0, "data": None, "versions": {}},
}


def outcome(name: str, score: float = 0.4321, *, shots: int | None = None, n: int | None = None, **more: Any) -> Outcome:
    row = ROWS[name]
    used = (row.shots or 0) if shots is None else shots
    counted = (row.documents or 1) if n is None else n
    return Outcome(Request(row, used), name, score, 0.01234, n=counted, shots=used, measure=row.measure, **more)
