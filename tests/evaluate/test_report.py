from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minifoundation.errors import UserError
from minifoundation.evaluate.protocols import ROWS, Outcome, Request
from minifoundation.evaluate.report import Baselines, Published, free_folder, table, write

FACTS: dict[str, Any] = {
    "settings": {"limit": 0},
    "model": {"path": "here", "parameters": 1000, "dtype": "float32", "device": "cpu", "max_length": 64},
    "versions": {"lm_eval": "0.4.13"},
    "sandbox": None,
}


def outcome(name: str, score: float = 0.4321, *, shots: int | None = None, n: int | None = None, **more: Any) -> Outcome:
    row = ROWS[name]
    used = (row.shots or 0) if shots is None else shots
    counted = (row.documents or 1) if n is None else n
    return Outcome(Request(row, used), name, score, 0.01234, n=counted, shots=used, measure=row.measure, **more)


def published(shots: int | None, measure: str | None) -> Published:
    return Published("M", "base", "verified", "S", 50.0, shots, measure)


@pytest.mark.parametrize(
    ("figure", "mark"),
    [
        (published(10, "acc_norm"), "="),
        (published(10, None), "~"),
        (published(10, "acc"), "≠"),
        (published(0, "acc_norm"), "≠"),
        (published(None, None), "≠"),
    ],
)
def test_a_figure_is_marked_by_how_it_was_measured(figure: Published, mark: str) -> None:
    assert figure.mark(outcome("hellaswag")) == mark
    assert figure.mark(outcome("hellaswag", n=100)) == "≠", "a sample compares with nothing"


def test_the_table_holds_score_error_chance_protocol_truncation_and_figures() -> None:
    outcomes = [
        outcome("hellaswag", truncated=3, requests=40_168),
        outcome("piqa", n=100),
        outcome("lambada_openai", also={"perplexity": 45.678}),
        Outcome(Request(ROWS["mbpp"], 3), "mbpp", not_run="needs --allow_code_exec"),
        Outcome(Request(ROWS["winogrande"], 5), "winogrande", not_run="data set allenai/winogrande: " + "no " * 30),
    ]
    text = table(outcomes, Baselines.load())
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")]
    names = ["Llama-3.2-1B", "Gemma-3-1B-PT", "Qwen2.5-0.5B", "Qwen2.5-1.5B"]
    assert rows[0] == ["benchmark", "protocol", "score", "± s.e.", "chance", "n", "truncated", *names]
    assert rows[2] == [
        "hellaswag",
        "10-shot, acc_norm",
        "43.2",
        "1.23",
        "25.0",
        "10042",
        "3 of 40168",
        "61.2 ≠",
        "62.3 ~",
        "52.1 ~",
        "67.9 ~",
    ]
    assert rows[3][5:] == ["100 of 1838", "0", "74.8 ≠", "73.8 ≠", "69.9 ≠", ""]
    assert rows[4][2] == "43.2 (perplexity 45.68)"
    assert rows[5][1] == "not run (needs --allow_code_exec)"
    assert rows[6][1].startswith("not run (data set allenai/winogrande: no no") and rows[6][1].endswith("...)")
    assert f"winogrande not run: {outcomes[-1].not_run}" in text and "mbpp not run" not in text, "a long reason stands whole below"
    assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1, "the columns stand straight"


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    import numpy as np

    raw = {"results": {"piqa": {"acc,none": np.float64(0.5), "count": np.int64(3), "flag": np.True_}}}
    write(tmp_path / "eval", [outcome("piqa", raw=raw, samples={"piqa": [{"secret": 1}]})], FACTS, Baselines.load())
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results["rows"][0]["lm_eval"]["results"]["piqa"] == {"acc,none": 0.5, "count": 3, "flag": True}
    assert results["rows"][0]["row"]["name"] == "piqa" and results["versions"] == {"lm_eval": "0.4.13"}
    assert "secret" not in (tmp_path / "eval" / "results.json").read_text()
    report = (tmp_path / "eval" / "report.md").read_text()
    assert "| piqa" in report and "TinyLlama-1.1B-3T" in report and "compare these scores with nothing" not in report
    write(tmp_path / "few", [outcome("piqa")], FACTS | {"settings": {"limit": 5}, "sandbox": "a box"}, Baselines.load())
    report = (tmp_path / "few" / "report.md").read_text()
    assert "Only the first 5 documents" in report and "ran under: a box" in report


def test_earlier_results_are_not_overwritten(tmp_path: Path) -> None:
    wanted = tmp_path / "eval"
    assert free_folder(wanted) == wanted
    for expected in ("eval", "eval-2", "eval-3"):
        folder = free_folder(wanted)
        assert folder.name == expected
        folder.mkdir()
        (folder / "results.json").touch()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        free_folder(tmp_path / "file")


def test_every_published_figure_belongs_to_a_benchmark_and_has_a_source() -> None:
    baselines = Baselines.load()
    assert set(baselines.figures) <= {row.baseline for row in ROWS.values()}
    figures = [figure for figures in baselines.figures.values() for figure in figures]
    assert {figure.status for figure in figures} == {"verified", "copy", "secondary"}
    assert {figure.kind for figure in figures} == {"base", "instruct", "proprietary"}
    assert all(figure.source and 0 < figure.score < 100 for figure in figures)
    assert set(baselines.beside) <= {figure.model for figure in figures}


def test_the_mmlu_of_qwen_often_called_instruct_is_the_base_models() -> None:
    of_qwen = {figure.model: (figure.score, figure.kind) for figure in Baselines.load().figures["mmlu"] if figure.model.startswith("Qwen")}
    assert of_qwen == {"Qwen2.5-0.5B": (47.5, "base"), "Qwen2.5-1.5B": (60.9, "base")}
