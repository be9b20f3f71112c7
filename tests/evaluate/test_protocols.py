from __future__ import annotations

from pathlib import Path

import pytest

from minifoundation.errors import UserError
from minifoundation.evaluate.protocols import ROWS, check_names, read_tasks
from tests.evaluate.tiny import ROOT


def test_a_file_names_tasks_with_comments_and_shots(tmp_path: Path) -> None:
    file = tmp_path / "tasks.txt"
    file.write_text("# all of them\n\nmmlu\narc_easy:5   # five\nhellaswag:10\nmmlu\nsciq\n")
    requests = read_tasks(str(file))
    assert [(request.row.name, request.shots) for request in requests] == [("mmlu", 5), ("arc_easy", 5), ("hellaswag", 10), ("sciq", None)]
    assert [request.label for request in requests] == ["mmlu", "arc_easy:5", "hellaswag", "sciq"]
    assert [request.known for request in requests] == [True, True, True, False]


def test_names_separated_by_commas() -> None:
    assert [request.label for request in read_tasks("piqa, arc_challenge:0")] == ["piqa", "arc_challenge:0"]


def test_the_shipped_list_asks_for_every_row_once() -> None:
    requests = read_tasks(str(ROOT / "configs" / "tasks.txt"))
    assert {request.row.name for request in requests} == set(ROWS)
    assert len({request.label for request in requests}) == len(requests)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("no/such/tasks.txt", "no such file"),
        ("tasks.txt", "no such file"),
        (" , ", "names no task"),
        ("mmlu:five", "'mmlu:five' does not end in a number of shots; write mmlu:5"),
    ],
)
def test_what_cannot_be_read_says_so(tasks: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        read_tasks(tasks)


@pytest.mark.parametrize(
    ("name", "message"),
    [("helaswag", "did you mean hellaswag"), ("sciqq", "did you mean sciq"), ("zzzzzz", "choose from mmlu, mmlu_redux")],
)
def test_an_unknown_name_gets_the_nearest_of_ours_then_of_lm_eval(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_names(read_tasks(name), ["sciq", "hellaswag_de"])


def test_shots_are_those_of_the_mission() -> None:
    shots = {"mmlu": 5, "hellaswag": 10, "arc_easy": 0, "arc_challenge": 25, "winogrande": 5, "piqa": 0, "truthfulqa_mc2": 0}
    shots |= {"lambada_openai": 0, "gsm8k_direct": 8, "gsm8k": 5, "humaneval": 0, "mbpp": 3, "mmlu_redux": 5, "minerva_math": 4}
    assert {name: ROWS[name].shots for name in shots} == shots
    assert {name for name, row in ROWS.items() if row.runs_code} == {"humaneval", "mbpp"}
    assert {name for name, row in ROWS.items() if row.aggregate == "macro"} == {"mmlu", "mmlu_redux", "mmlu_continuation"}
