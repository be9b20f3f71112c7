"""The benchmarks: one row a benchmark, with how it is measured.

Shots follow the Gemma 3 model card where it names a benchmark. A row names either a task of lm-eval or one of ours in
``evaluate/tasks``; what a person may ask differently of it is in ``requests``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
        documents: how many the whole benchmark has (of each length); fewer make a sample of it. None: as many as its data set.
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
        Row("niah_single_1", ("ruler",), 0, None, "string match", 0.0, 500, lengths=True),
        Row("niah_multikey_2", ("ruler",), 0, None, "string match", 0.0, 500, lengths=True),
        Row("ruler_vt", ("ruler",), 0, None, "string match", 0.0, 500, lengths=True),
    )
}
