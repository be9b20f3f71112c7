"""Benchmarks during training: the scores of eval, the training of a run without them."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minifoundation.cli import main
from tests.evaluate.tiny import BUNDLED, ROOT

SIZES = {"d_model": 32, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_ff": 64, "original_seq_len": 256}
TASKS = ["--eval.every_steps", "3", "--eval.tasks", "arc_easy,piqa", "--eval.limit", "6", "--eval.data_dir", str(BUNDLED)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some verse, for the runs of this file; their shards and tokenizer come to lie there too."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "verse").mkdir()
    (folder / "verse" / "verse.txt").write_bytes((ROOT / "examples" / "shakespeare.txt").read_bytes()[:60_000])
    line = ["prepare", "--data", str(folder / "verse"), "--data.shards_dir", str(folder / "shards"), "--tokenizer.vocab_size", "512"]
    line += ["--tokenizer_out", str(folder), "--data.max_document_bytes", "512", "--data.held_out", "0.3", "--tokens", "20_000"]
    assert main(line) == 0
    return folder


def run(shared: Path, out_dir: Path, *flags: str) -> int:
    """Train six steps and return the exit code."""
    line = ["pretrain", *(part for name, value in SIZES.items() for part in (f"--model.{name}", str(value)))]
    line += ["--data", str(shared / "verse"), "--data.shards_dir", str(shared / "shards"), "--tokenizer", str(shared / "tokenizer.model")]
    line += ["--data.max_document_bytes", "512", "--data.held_out", "0.3", "--seq_len", "64", "--batch_size", "4", "--tokens", str(6 * 256)]
    line += ["--train.save_every", "3", "--train.eval_every", "2", "--train.eval_tokens", "512", "--lr", "0.05", "--out_dir", str(out_dir)]
    return main([*line, *flags])


def rows(out_dir: Path) -> list[dict[str, str]]:
    with (out_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def learnt(out_dir: Path) -> list[list[str]]:
    """What of the rows depends neither on the clock nor on benchmarks."""
    return [[row[name] for name in ("step", "loss", "held_out_bits_per_byte", "grad_norm")] for row in rows(out_dir)]


@pytest.mark.parametrize("ema", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_scores_are_those_of_eval_on_the_checkpoint_and_training_is_what_it_was(shared: Path, tmp_path: Path, ema: bool) -> None:
    averaged = ["--train.ema", "0.5"]
    assert run(shared, tmp_path / "run", *averaged, *TASKS, *(["--eval.ema"] if ema else [])) == 0
    assert run(shared, tmp_path / "plain", *averaged) == 0
    assert learnt(tmp_path / "run") == learnt(tmp_path / "plain")
    found = [(row["step"], row["eval/arc_easy"], row["eval/piqa"]) for row in rows(tmp_path / "run") if row["eval/piqa"]]
    assert [step for step, _, _ in found] == ["3", "6"]
    for checkpoint, (_, *scores) in zip(("step_00000003", "final.pth"), found, strict=True):
        line = ["eval", "--model_path", str(tmp_path / "run" / checkpoint), "--tasks", "arc_easy,piqa", "--limit", "6"]
        line += ["--data_dir", str(BUNDLED), "--out_dir", str(tmp_path / checkpoint), *(["--ema"] if ema else [])]
        assert main(line) == 0
        results = json.loads((tmp_path / checkpoint / "results.json").read_text())["rows"]
        assert scores == [f"{row['score']:.6g}" for row in results]


@pytest.mark.slow
def test_a_run_that_is_stopped_among_its_benchmarks_makes_up_for_them(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minifoundation.evaluate import harness

    assert run(shared, tmp_path / "whole", *TASKS) == 0
    real = harness.run

    def told(*args: Any, **options: Any) -> Iterator[Any]:
        for outcomes in real(*args, **options):
            os.kill(os.getpid(), signal.SIGTERM)
            yield outcomes

    monkeypatch.setattr(harness, "run", told)
    assert run(shared, tmp_path / "run", *TASKS) == 0
    assert "stopped at step 3 of 6 and saved" in capsys.readouterr().err
    assert [row["step"] for row in rows(tmp_path / "run")] == ["1", "2"], "the row of the step waits for its scores"
    monkeypatch.setattr(harness, "run", real)
    assert run(shared, tmp_path / "run", *TASKS, "--resume", "auto") == 0
    whole, resumed = ([(row["eval/arc_easy"], row["eval/piqa"]) for row in rows(tmp_path / name)] for name in ("whole", "run"))
    assert whole == resumed and learnt(tmp_path / "whole") == learnt(tmp_path / "run")


@pytest.mark.slow
def test_columns_of_an_earlier_start_stay(shared: Path, tmp_path: Path) -> None:
    assert run(shared, tmp_path / "run", *TASKS, "--train.max_hours", "1") == 0
    (tmp_path / "run" / "final.pth").unlink()
    assert run(shared, tmp_path / "run", "--resume", "auto") == 0
    assert [bool(row["eval/piqa"]) for row in rows(tmp_path / "run")] == [False, False, True, False, False, False]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval.tasks", "arc_eazy"], "--tasks: 'arc_eazy' is not a task; did you mean arc_easy?"),
        (["--eval.tasks", "humaneval"], "eval.tasks: humaneval runs programs; leave it to eval, after training"),
        (["--eval.data_dir", "nowhere"], "eval.data_dir: nowhere: no such folder"),
        (["--eval.tasks", "winogrande"], "winogrande/winogrande_xl: no such folder in --data_dir"),
        (["--eval.ema"], "eval.ema is on, but train.ema is none; leave eval.ema out"),
    ],
)
def test_a_benchmark_that_cannot_run_is_known_before_training(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert run(shared, tmp_path / "run", *TASKS, *flags) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()
