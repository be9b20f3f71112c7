from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minifoundation.errors import UserError
from minifoundation.evaluate.requests import read_tasks
from minifoundation.evaluate.results import Outcome, file_name, folder_for, read_items, read_results
from tests.evaluate.made import FACTS, outcome

ITEM: dict[str, Any] = {"task": "piqa", "doc_id": 0, "doc_hash": "x", "score": 1.0, "target": 1, "log_likelihoods": [-1.5, -2.0]}


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    raw = {"results": {"piqa": {"acc,none": np.float64(0.5), "count": np.int64(3), "flag": np.True_}}}
    folder = folder_for(tmp_path / "eval", FACTS, [])
    folder.write([outcome("piqa", raw=raw, items=[ITEM], samples={"piqa": [{"secret": 1}]})], complete=True)
    results = read_results(tmp_path / "eval")
    assert results["rows"][0]["lm_eval"]["results"]["piqa"] == {"acc,none": 0.5, "count": 3, "flag": True}
    assert results["rows"][0]["row"]["name"] == "piqa" and results["versions"] == {"lm_eval": "0.4.13"} and results["complete"]
    assert "secret" not in (tmp_path / "eval" / "results.json").read_text()
    assert read_items(tmp_path / "eval", "piqa") == [ITEM] and read_items(tmp_path / "eval", "mmlu") == []


def test_an_answer_may_hold_any_character(tmp_path: Path) -> None:
    answers = [ITEM | {"written": f"one{character}two", "doc_id": ord(character)} for character in "\n\r\x0b\x0c\x1c\x85\u2028\u2029"]
    folder_for(tmp_path / "eval", FACTS, []).write([outcome("piqa", items=answers)], complete=True)
    assert read_items(tmp_path / "eval", "piqa") == answers
    file = tmp_path / "eval" / "items" / "piqa.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"piqa.jsonl: is damaged; run eval again, or remove the folder"):
        read_items(tmp_path / "eval", "piqa")


def test_finished_results_are_not_overwritten(tmp_path: Path) -> None:
    wanted = tmp_path / "eval"
    for expected in ("eval", "eval-2", "eval-3"):
        folder = folder_for(wanted, FACTS, [])
        assert folder.path.name == expected and folder.done == {}
        folder.write([outcome("piqa")], complete=True)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        folder_for(tmp_path / "file", FACTS, [])
    with pytest.raises(UserError, match=r"--out_dir: .*/file/eval cannot be written \(Not a directory\); give another folder"):
        folder_for(tmp_path / "file" / "eval", FACTS, [])


def test_a_stopped_evaluation_goes_on_with_what_is_done(tmp_path: Path) -> None:
    requests = read_tasks("piqa,hellaswag,arc_easy limit=5")
    done = outcome("piqa", items=[ITEM], also={"perplexity": 2.0})
    failed = outcome("hellaswag")
    failed.score, failed.not_run = None, "no data"
    folder_for(tmp_path, FACTS, requests).write([done, failed], complete=False)
    again = folder_for(tmp_path, FACTS, requests)
    assert again.path == tmp_path and list(again.done) == ["piqa"], "what could not run is tried again"
    (restored,) = again.done["piqa"]
    assert vars(restored) == vars(done)
    counted = replace(read_tasks("sciq")[0], row=replace(read_tasks("sciq")[0].row, documents=1000))
    part = Outcome(counted, "sciq", score=0.5, n=20)
    folder_for(tmp_path / "other", FACTS, [counted]).write([part], complete=False)
    (restored,) = folder_for(tmp_path / "other", FACTS, read_tasks("sciq,piqa")).done["sciq"]
    assert restored.is_sample and vars(restored) == vars(part)
    other = folder_for(tmp_path, FACTS, read_tasks("piqa limit=7"))
    assert other.done == {} and other.path != tmp_path, "another limit is another request, and must not take the place of what is there"


def test_a_folder_in_which_nothing_could_run_is_used_again(tmp_path: Path) -> None:
    failed = outcome("piqa")
    failed.score, failed.not_run = None, "no such folder in --data_dir"
    folder_for(tmp_path / "eval", FACTS, read_tasks("piqa")).write([failed], complete=True)
    other = FACTS | {"identity": FACTS["identity"] | {"data": "another"}}
    again = folder_for(tmp_path / "eval", other, read_tasks("hellaswag"))
    assert again.path == tmp_path / "eval" and again.done == {}


def test_what_could_not_run_and_what_is_asked_for_since_is_made_up_for(tmp_path: Path) -> None:
    failed = outcome("humaneval")
    failed.score, failed.not_run = None, "needs --allow_code_exec"
    requests = read_tasks("piqa,humaneval")
    folder_for(tmp_path / "eval", FACTS, requests).write([outcome("piqa"), failed], complete=True)
    for asked in ("piqa,humaneval", "piqa,humaneval,arc_easy"):
        again = folder_for(tmp_path / "eval", FACTS, read_tasks(asked))
        assert again.path == tmp_path / "eval" and list(again.done) == ["piqa"]
    assert folder_for(tmp_path / "eval", FACTS, read_tasks("piqa")).path == tmp_path / "eval-2", "all that is asked for is there"
    assert folder_for(tmp_path / "eval", FACTS, read_tasks("humaneval")).path == tmp_path / "eval-2", "the score of piqa would be lost"


@pytest.mark.parametrize("changed", ["model", "dtype", "engine", "limit", "data", "versions"])
def test_another_model_or_other_data_does_not_go_on(tmp_path: Path, changed: str) -> None:
    folder_for(tmp_path / "eval", FACTS, []).write([outcome("piqa")], complete=False)
    other = FACTS | {"identity": FACTS["identity"] | {changed: "another"}}
    folder = folder_for(tmp_path / "eval", other, read_tasks("piqa"))
    assert folder.path == tmp_path / "eval-2" and folder.done == {}


@pytest.mark.parametrize("content", ["", "{", "[]", json.dumps({"rows": []})])
def test_results_of_something_else_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match="is not a result of eval of this version"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    "what",
    ["settings", "model.sha256", "model.max_length", "rows.0.shots", "rows.0.row.name", "rows.0.metric", "versions.lm_eval", "sandbox"],
)
@pytest.mark.parametrize("value", [[], {"a": 1}, 1.5, None])
def test_results_of_another_form_are_refused(tmp_path: Path, what: str, value: Any) -> None:
    """Of another version, or changed by hand: each part has to be what readers take it for."""
    folder_for(tmp_path, FACTS, []).write([outcome("piqa")], complete=True)
    content = part = json.loads((tmp_path / "results.json").read_text())
    *sections, last = (int(name) if name.isdigit() else name for name in what.split("."))
    for name in sections:
        part = part[name]
    if value is None and what != "sandbox":
        del part[last]
    else:
        part[last] = value
    (tmp_path / "results.json").write_text(json.dumps(content))
    if value is None and what == "sandbox":
        assert read_results(tmp_path) == content
        return
    with pytest.raises(UserError, match="is not a result of eval of this version"):
        read_results(tmp_path)


def test_figures_that_are_not_finite_read_back(tmp_path: Path) -> None:
    raw = {"results": {"piqa": {"acc,none": float("nan")}}}
    folder_for(tmp_path, FACTS, []).write([outcome("piqa", raw=raw, also={"perplexity": float("inf")})], complete=True)
    (row,) = read_results(tmp_path)["rows"]
    assert row["also"]["perplexity"] == float("inf") and row["lm_eval"]["results"]["piqa"]["acc,none"] != 0


def test_labels_are_names_of_files() -> None:
    assert file_name("mmlu:0 aggregate=micro") == "mmlu_0_aggregate=micro" and file_name("ruler_vt@4096") == "ruler_vt@4096"
