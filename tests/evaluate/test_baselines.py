from __future__ import annotations

from pathlib import Path

import pytest

from minifoundation.errors import UserError
from minifoundation.evaluate.baselines import RERUN, Baselines, Figure
from minifoundation.evaluate.protocols import ROWS
from minifoundation.evaluate.results import folder_for
from minifoundation.evaluate.tables import table
from tests.evaluate.made import FACTS, outcome


def published(shots: int | None, measure: str | None) -> Figure:
    return Figure("M", "base", "verified", "S", 50.0, shots, measure)


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
def test_a_figure_is_marked_by_how_it_was_measured(figure: Figure, mark: str) -> None:
    assert figure.mark(outcome("hellaswag")) == mark
    assert figure.mark(outcome("hellaswag", n=100)) == "≠", "a sample compares with nothing"


def test_of_several_figures_of_a_model_the_one_measured_most_like_ours_stands_beside() -> None:
    baselines = Baselines.load()
    beside = {
        label: baselines.nearest(outcome(name, shots=shots, n=n), "Qwen2.5-0.5B")
        for label, name, shots, n in (
            ("hellaswag", "hellaswag", 10, None),
            ("hellaswag:0", "hellaswag", 0, None),
            ("hellaswag:0 of 200", "hellaswag", 0, 200),
            ("gsm8k", "gsm8k", 5, None),
            ("gsm8k:2", "gsm8k", 2, None),
        )
    }
    shown = {label: (one.score, one.shots) for label, one in beside.items() if one is not None}
    assert shown == {
        "hellaswag": (52.1, 10),
        "hellaswag:0": (51.2, 0),
        "hellaswag:0 of 200": (51.2, 0),
        "gsm8k": (33.4, 5),
        "gsm8k:2": (41.6, 4),
    }
    assert baselines.nearest(outcome("piqa"), "GPT-2-124M") is None


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


def test_another_model_re_run_here_stands_beside_ours(tmp_path: Path) -> None:
    theirs = FACTS | {"model": FACTS["model"] | {"path": "models/Qwen/Qwen2.5-0.5B"}}
    folder_for(tmp_path, theirs, []).write([outcome("piqa", 0.7), outcome("hellaswag", 0.5, n=100)], complete=True)
    baselines = Baselines.load(reruns=[tmp_path])
    name = f"Qwen/Qwen2.5-0.5B ({RERUN})"
    assert [(figure.score, figure.mark(outcome("piqa"))) for figure in baselines.of(outcome("piqa")) if figure.model == name] == [
        (70.0, "=")
    ]
    text = table([outcome("piqa"), outcome("hellaswag")], baselines)
    assert name in text and "70.0 =" in text and "50.0 ≠" in text, "100 documents of HellaSwag are not all of them"
    with pytest.raises(UserError, match=r"holds no results\.json; give a folder that eval wrote"):
        Baselines.load(reruns=[tmp_path / "nowhere"])


def test_of_re_runs_with_other_limits_the_one_on_as_many_documents_stands_beside_ours(tmp_path: Path) -> None:
    rows = [outcome("piqa", score, n=n) for score, n in ((0.5, 4), (0.6, 8), (0.7, None))]
    for row, label in zip(rows, ("piqa limit=4", "piqa limit=8", "piqa"), strict=True):
        row.label = label
    folder_for(tmp_path, FACTS, []).write(rows, complete=True)
    baselines = Baselines.load(reruns=[tmp_path])
    first = [next(one.score for one in baselines.of(row) if one.status == RERUN) for row in rows]
    assert first == pytest.approx([50.0, 60.0, 70.0])
