from __future__ import annotations

import json
from pathlib import Path

import pytest

from minifoundation.cli import main
from tests.evaluate.tiny import BUNDLED, ROOT, write_tiny_model


def test_the_demo_list_ends_in_a_table_and_two_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny_model(tmp_path / "model")
    line = [
        "eval",
        "--model_path",
        str(folder),
        "--tasks",
        str(ROOT / "configs/tasks_demo.txt"),
        "--data_dir",
        str(BUNDLED),
        "--limit",
        "4",
    ]
    assert main(line) == 0
    printed = capsys.readouterr()
    assert "| arc_easy " in printed.out and "| hellaswag:0 " in printed.out and "| piqa " in printed.out
    assert "Traceback" not in printed.err and "WARNING" not in printed.err
    results = json.loads((folder / "eval" / "results.json").read_text())
    assert [row["label"] for row in results["rows"]] == ["arc_easy", "hellaswag:0", "piqa"]
    assert all(row["n"] == 4 and row["not_run"] is None for row in results["rows"])
    assert results["settings"]["limit"] == 4 and results["model"]["bos"] is True
    assert len(results["model"]["sha256"]["model.safetensors"]) == 64
    assert main([*line[:4], "piqa", *line[5:]]) == 0
    assert str(folder / "eval-2" / "report.md") in capsys.readouterr().out


def test_no_task_that_could_run_is_an_error_with_the_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny_model(tmp_path / "model")
    out = tmp_path / "out"
    assert main(["eval", "--model_path", str(folder), "--tasks", "mbpp,winogrande", "--data_dir", str(BUNDLED), "--out_dir", str(out)]) == 2
    printed = capsys.readouterr()
    assert "not run (needs --allow_code_exec)" in printed.out
    assert "winogrande_xl: no such folder in --data_dir" in printed.out
    assert printed.err.strip().splitlines()[-1] == "error: eval: no task could run; the table says why for each"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model_path", "nowhere", "--tasks", "piqa"], "--model_path: nowhere: no such folder; write one with export_hf"),
        (["--model_path", "outputs/hf_export", "--tasks", "piqa"], "--model_path: outputs/hf_export: no such folder; write one"),
        (
            ["--model_path", "no-such/model", "--tasks", "piqa"],
            "--model_path: no-such/model: no such folder, and not to be had from the hub",
        ),
        (["--model_path", ".", "--tasks", "piqa"], "--model_path: . holds no config.json; give a folder written by export_hf"),
        (["--model_path", ".", "--tasks", "no/tasks.txt"], "--tasks: no/tasks.txt: no such file"),
        (["--model_path", ".", "--tasks", "piqa", "--data_dir", "nowhere"], "--data_dir: nowhere: no such folder"),
        (["--model_path", ".", "--limit", "-1"], "limit: "),
    ],
)
def test_what_cannot_be_found_is_one_line(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {message}")


def test_a_broken_model_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny_model(tmp_path)
    (folder / "model.safetensors").write_bytes(b"not weights")
    assert main(["eval", "--model_path", str(folder), "--tasks", "piqa", "--data_dir", str(BUNDLED)]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: --model_path: {folder} does not load (")
