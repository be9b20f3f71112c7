"""The benchmarks: one row a benchmark, with how it is measured; and the list of tasks a person asks for.

Shots follow the Gemma 3 model card where it names a benchmark. A row names either a task of lm-eval or one of ours in
``evaluate/tasks``; ``name:shots`` overrides the shots of one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from minifoundation.errors import UserError

OWN = "own"
"""Stands for the folder of our own task files among the folders of a row."""


@dataclass(frozen=True)
class Row:
    """One benchmark and the way it is measured.

    Attributes:
        folders: where its YAML lies below ``lm_eval/tasks`` (``own``: below ``evaluate/tasks``); only these are scanned.
        shots: examples in the prompt; None keeps what the task says (tasks of lm-eval without a row here).
        metric, filter: the headline number among those lm-eval computes.
        measure: how the answer is scored, in the words ``configs/baselines.yaml`` uses, so that the two compare.
        chance: score of guessing, as a share.
        documents: how many the whole benchmark has; fewer make a sample of it.
        baseline: key of the published figures in ``configs/baselines.yaml``.
        aggregate: macro is the plain mean over leaves (MMLU's definition), micro weighs them by documents.
        also: further metrics shown beside the headline.
        lengths: the metric is a context length, one result for each.
    """

    name: str
    folders: tuple[str, ...]
    shots: int | None
    metric: str | None
    measure: str
    chance: float | None
    documents: int | None = None
    baseline: str | None = None
    filter: str = "none"
    tasks: tuple[str, ...] = ()
    aggregate: Literal["micro", "macro"] = "micro"
    also: tuple[str, ...] = ()
    runs_code: bool = False
    lengths: bool = False

    @property
    def task_names(self) -> list[str]:
        return list(self.tasks) or [self.name]


_MATH = ("algebra", "counting_and_prob", "geometry", "intermediate_algebra", "num_theory", "prealgebra", "precalc")

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("mmlu", ("mmlu/default",), 5, "acc", "letters, macro", 0.25, 14_042, "mmlu", aggregate="macro"),
        Row("mmlu_redux", (OWN, "mmlu/default"), 5, "acc", "letters, macro", 0.25, 5_330, "mmlu_redux", aggregate="macro"),
        Row("mmlu_continuation", ("mmlu/continuation",), 0, "acc_norm", "acc_norm, macro", 0.25, 14_042, "mmlu_cloze", aggregate="macro"),
        Row("mmlu_pro", ("mmlu_pro",), 5, "exact_match", "chain of thought", 0.111, 12_032, "mmlu_pro", filter="custom-extract"),
        Row("mmlu_pro_mc", (OWN, "mmlu_pro"), 5, "acc", "letters", 0.111, 12_032, "mmlu_pro"),
        Row("hellaswag", ("hellaswag",), 10, "acc_norm", "acc_norm", 0.25, 10_042, "hellaswag"),
        Row("arc_easy", ("arc",), 0, "acc_norm", "acc_norm", 0.25, 2_376, "arc_easy"),
        Row("arc_challenge", ("arc",), 25, "acc_norm", "acc_norm", 0.25, 1_172, "arc_challenge"),
        Row("arc_challenge_mcf", (OWN,), 25, "acc", "letters", 0.25, 1_172, "arc_challenge"),
        Row("winogrande", ("winogrande",), 5, "acc", "acc", 0.5, 1_267, "winogrande"),
        Row("truthfulqa_mc2", ("truthfulqa",), 0, "acc", "mc2", 0.464, 817, "truthfulqa"),
        Row("piqa", ("piqa",), 0, "acc_norm", "acc_norm", 0.5, 1_838, "piqa"),
        Row("lambada_openai", ("lambada",), 0, "acc", "acc", 0.0, 5_153, "lambada_openai", also=("perplexity",)),
        Row("gsm8k_direct", (OWN,), 8, "exact_match", "answer only", 0.0, 1_319, "gsm8k", filter="number"),
        Row("gsm8k", ("gsm8k",), 5, "exact_match", "chain of thought", 0.0, 1_319, "gsm8k", filter="strict-match"),
        Row("hendrycks_math", (OWN, "hendrycks_math"), 4, "exact_match", "answer only", 0.0, 5_000, "math"),
        Row(
            "minerva_math",
            ("minerva_math",),
            4,
            "exact_match",
            "chain of thought",
            0.0,
            5_000,
            "math",
            tasks=tuple(f"minerva_math_{subject}" for subject in _MATH),
        ),
        Row("humaneval", (OWN,), 0, "pass@1", "pass@1", 0.0, 164, "humaneval", runs_code=True),
        Row("mbpp", (OWN,), 3, "pass@1", "pass@1", 0.0, 500, "mbpp", runs_code=True),
        Row("niah_single_1", ("ruler",), 0, None, "string match", 0.0, lengths=True),
        Row("niah_multikey_2", ("ruler",), 0, None, "string match", 0.0, lengths=True),
        Row("ruler_vt", ("ruler",), 0, None, "string match", 0.0, lengths=True),
    )
}


@dataclass(frozen=True)
class Request:
    """A row asked for, with the shots to use."""

    row: Row
    shots: int | None

    @property
    def label(self) -> str:
        return self.row.name if self.shots == self.row.shots else f"{self.row.name}:{self.shots}"

    @property
    def known(self) -> bool:
        return self.row.name in ROWS


@dataclass
class Outcome:
    """What one request came to: a score with its standard error as shares (0 to 1), or the reason why there is none.

    ``samples`` are lm-eval's logged documents by task; they are not written to disk. ``raw`` is everything else it returned.
    """

    request: Request
    label: str
    score: float | None = None
    stderr: float | None = None
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
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def protocol(self) -> str:
        return f"{self.shots}-shot, {self.measure}"


def read_tasks(tasks: str) -> list[Request]:
    """Return what ``tasks`` asks for: a file with one ``name`` or ``name:shots`` a line, or such names separated by commas.

    ``#`` begins a comment. A name without a row here becomes one that keeps lm-eval's own settings; whether it exists is for
    ``check_names`` to say, once the tasks of lm-eval are known.

    Raises:
        UserError: no such file, nothing in it, or shots that are not a number.
    """
    path = Path(tasks)
    if path.is_file():
        entries = [line.split("#", 1)[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    elif path.suffix or len(path.parts) > 1:
        raise UserError("--tasks", f"{tasks}: no such file", "give a file with one task a line, or names separated by commas")
    else:
        entries = [entry.strip() for entry in tasks.split(",")]
    requests = [_request(entry) for entry in entries if entry]
    if not requests:
        raise UserError("--tasks", f"{tasks!r} names no task", f"write one task a line, for example {next(iter(ROWS))}")
    return list(dict.fromkeys(requests))


def _request(entry: str) -> Request:
    name, _, shots = entry.partition(":")
    row = ROWS.get(name) or Row(name, (), None, None, "as lm-eval", None)
    if not shots:
        return Request(row, row.shots)
    if not shots.isdigit():
        raise UserError("--tasks", f"{entry!r} does not end in a number of shots", f"write {name}:5, or {name} alone")
    return Request(row, int(shots))


def check_names(requests: Sequence[Request], known: Sequence[str]) -> None:
    """Raise UserError with the nearest name when a request is neither a row nor among the ``known`` names of lm-eval."""
    for request in requests:
        name = request.row.name
        if not request.known and name not in known:
            near = get_close_matches(name, list(ROWS), n=1) or get_close_matches(name, known, n=1)
            raise UserError("--tasks", f"{name!r} is no task", f"did you mean {near[0]}?" if near else f"choose from {', '.join(ROWS)}")
