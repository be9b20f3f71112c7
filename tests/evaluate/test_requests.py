from __future__ import annotations

from pathlib import Path

import pytest

from minifoundation.errors import UserError
from minifoundation.evaluate.protocols import ROWS
from minifoundation.evaluate.requests import SUITES, check_names, read_tasks
from tests.evaluate.tiny import ROOT


def test_a_file_names_tasks_with_comments_and_changes(tmp_path: Path) -> None:
    file = tmp_path / "tasks.txt"
    file.write_text(
        "# all of them\n\nmmlu\narc_easy:5   # five\nhellaswag:10\nmmlu\nsciq\n"
        "piqa metric=acc limit=100\nmmlu:0 aggregate=micro\narc_easy metric=acc_norm\n"
    )
    requests = read_tasks(str(file))
    labels = ["mmlu", "arc_easy:5", "hellaswag", "sciq", "piqa metric=acc limit=100", "mmlu:0 aggregate=micro", "arc_easy"]
    assert [request.label for request in requests] == labels
    assert [request.shots for request in requests] == [5, 5, 10, None, 0, 0, 0]
    assert [request.known for request in requests] == [True, True, True, False, True, True, True]
    piqa, mmlu = requests[4], requests[5]
    assert (piqa.row.metric, piqa.row.measure, piqa.limit) == ("acc", "acc", 100)
    assert (mmlu.row.aggregate, mmlu.limit) == ("micro", 0)


@pytest.mark.parametrize(
    ("tasks", "label", "measure"),
    [
        ("mmlu", "mmlu", "letters, macro"),
        ("mmlu aggregate=micro", "mmlu aggregate=micro", "letters"),
        ("mmlu metric=acc_norm", "mmlu metric=acc_norm", "acc_norm, macro"),
        ("mmlu metric=acc_norm aggregate=micro", "mmlu metric=acc_norm aggregate=micro", "acc_norm"),
        ("mmlu_pro aggregate=macro", "mmlu_pro aggregate=macro", "chain of thought, macro"),
        ("mmlu limit=20 aggregate=micro", "mmlu aggregate=micro limit=20", "letters"),
        ("sciq", "sciq", "as lm-eval"),
        ("sciq:5 metric=acc", "sciq:5 metric=acc", "acc"),
    ],
)
def test_what_is_asked_for_differently_is_called_so(tasks: str, label: str, measure: str) -> None:
    """The measure says whether a published figure compares, the label which results are already there."""
    (request,) = read_tasks(tasks)
    assert (request.label, request.row.measure) == (label, measure)


def test_names_separated_by_commas() -> None:
    assert [request.label for request in read_tasks("piqa, arc_challenge:0 metric=acc")] == ["piqa", "arc_challenge:0 metric=acc"]


def test_suites() -> None:
    paper = read_tasks("paper")
    assert paper == read_tasks(str(ROOT / "configs" / "tasks.txt"))
    assert {request.row.name for request in paper} == set(ROWS)
    assert len({request.label for request in paper}) == len(paper)
    assert {request.row.name for request in read_tasks("code")} == {name for name, row in ROWS.items() if row.runs_code}
    assert {request.row.name for request in read_tasks("long")} == {name for name, row in ROWS.items() if row.lengths}
    quick = read_tasks("quick")
    assert all(request.known and request.shots == 0 and not request.row.runs_code for request in quick)
    assert [request.label for request in read_tasks("code,quick,piqa")] == ["humaneval", "mbpp", *(request.label for request in quick)]
    assert all(path.is_file() for path in SUITES.values())


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("no/such/tasks.txt", "no such file"),
        ("tasks.txt", "no such file"),
        (" , ", "names no task"),
        ("mmlu:five", "'mmlu:five' does not end in a number of shots; write mmlu:5"),
        ("mmlu:", "'mmlu:' does not end in a number of shots"),
        (
            "quick limit=10",
            "'quick limit=10': quick is a suite, not a task; give --tasks quick alone, with --limit for fewer documents, or copy",
        ),
        ("quick:0,piqa", "'quick:0': quick is a suite, not a task"),
        ("mmlu shots=5", "'shots=5' in 'mmlu shots=5' is not understood; write name, name:shots"),
        ("mmlu 5", "'5' in 'mmlu 5' is not understood"),
        ("mmlu aggregate=mean", "'aggregate=mean' in"),
        ("piqa limit=-1", "'limit=-1' in"),
        ("ruler_vt metric=acc", "'metric=acc' in"),
    ],
)
def test_what_cannot_be_read_says_so(tasks: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        read_tasks(tasks)


def test_a_file_of_another_system_reads_the_same(tmp_path: Path) -> None:
    (tmp_path / "tasks.txt").write_bytes("\ufeffpiqa\r\n# ours\r\narc_easy:5 limit=7\r\n".encode())
    assert read_tasks(str(tmp_path / "tasks.txt")) == read_tasks("piqa,arc_easy:5 limit=7")


def test_a_line_of_a_file_is_named_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "tasks.txt").write_text("piqa\nmmlu five\n")
    with pytest.raises(UserError, match=r"tasks\.txt:2: 'five' in 'mmlu five'"):
        read_tasks(str(tmp_path / "tasks.txt"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("helaswag", "did you mean hellaswag"),
        ("quik", "did you mean quick"),
        ("sciqq", "did you mean sciq"),
        ("zzzzzz", "choose from mmlu, mmlu_redux"),
    ],
)
def test_an_unknown_name_gets_the_nearest_of_ours_then_of_lm_eval(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_names(read_tasks(name), ["sciq", "hellaswag_de"])
