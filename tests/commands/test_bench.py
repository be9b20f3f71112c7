"""``bench`` on a CPU: every table, the figures as JSON, and what fits."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minifoundation import cli, runtime
from minifoundation.commands import bench
from minifoundation.commands.bench import bench as command
from minifoundation.config import BenchOptions
from minifoundation.runtime import Machine
from minifoundation.train.trial import trial

TINY = "{model: {d_model: 32, n_layer: 4, n_head: 4, n_kv_head: 2, d_ff: 64, vocab_size: 8192}}"


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a GPU: of one, ``tests/gpu`` measures more."""
    cpu = replace(runtime.machine(), device=torch.device("cpu"), name="CPU", peak_flops=None)
    monkeypatch.setattr(runtime, "machine", lambda: cpu)


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    return path


def test_every_table_on_a_cpu(yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures" / "bench.json"
    assert cli.main(["bench", "--config", str(yaml), "--json", str(path)]) == 0
    said = capsys.readouterr().out
    assert "on a CPU: a part of it (n_layer 2, vocab_size" in said
    for table in ("matrix products by themselves", "attention of a block", "a step of 1 x 256 x 1", "where its time goes"):
        assert table in said
    figures = json.loads(path.read_text(encoding="utf-8"))
    assert {product["name"] for product in figures["ceilings"]["products"]} == {"qkv", "out", "gate, up", "down", "head"}
    assert set(figures["attention_ms"]) == {"auto", "math"} and all(ms > 0 for ms in figures["attention_ms"].values())
    assert figures["step"]["tokens_per_second"] > 0 and figures["step"]["profile"]["ms"]["matrix products"] > 0
    assert f"{figures['step']['tokens_per_second']:,}" in said


def test_a_model_that_is_smaller_than_a_cpu_can_do_is_measured_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    small = ["--model.original_seq_len", "64", "--seq_len", "64", "--model.n_layer", "1", "--model.vocab_size", "128"]
    assert cli.main(["bench", "--config", str(path), *small]) == 0
    said = capsys.readouterr().out
    assert "on a CPU: a part of it (n_layer 1, vocab_size 128, one row of 64 tokens)" in said and "a step of 1 x 64 x 1" in said


def test_what_the_machine_cannot_do_is_replaced_as_in_training(yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--seq_len", "64", "--model.vocab_size", "128", "--train.precision", "fp8", "--model.checkpointing", "offload"]
    assert cli.main(["bench", "--config", str(yaml), *small]) == 0
    said = capsys.readouterr().out
    assert "train.precision: fp8 cannot run here: CPU has no 8-bit products; using bf16" in said
    assert "a step of 1 x 64 x 1, checkpointing attention" in said


def test_a_place_for_the_figures_that_cannot_be_written_shows_before_they_are_measured(
    yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "_measured", None)
    for path, message in (
        (tmp_path, f"error: --json: {tmp_path} is a folder; give the path of a file\n"),
        (yaml / "x", f"error: {yaml}: file exists; it is a file and a folder is needed: give another path\n"),
    ):
        assert cli.main(["bench", "--config", str(yaml), "--json", str(path)]) == 2
        assert capsys.readouterr().err == message


def pretended(rows_that_fit: dict[str, int], rates: dict[str, float]) -> Any:
    """Return a ``trial`` on a GPU with room for so many rows, whose tokens/s depend on checkpointing."""
    real = trial

    def tried(run: Any, _machine: Machine, **how: Any) -> Any:
        way = run.model.checkpointing
        if run.train.batch_size > rows_that_fit[way]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        small = run.replaced(train={"batch_size": 1, "grad_accum": 1, "seq_len": 16})
        found = real(small, Machine(torch.device("cpu"), "CPU", 2**34, None), steps=1, warm_up=1, profiled=how.get("profiled", False))
        object.__setattr__(found, "seconds", [found.tokens_per_step / rates[way]])
        return found

    return tried


@pytest.mark.parametrize(("step", "micro"), [({"grad_accum": 16}, "--grad_accum 2 "), ({"tokens_per_step": 1024}, "")])
def test_the_fastest_of_what_fits_is_recommended(
    yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], step: dict[str, int], micro: str
) -> None:
    """Where no recomputation leaves room for two rows, and some for eight at a higher rate."""
    monkeypatch.setattr(bench, "ON_A_CPU", {"train": {"seq_len": 64}})
    fitting = {"none": 2, "attention": 8, "full": 16}
    monkeypatch.setattr(bench, "trial", pretended(fitting, {"none": 100.0, "attention": 130.0, "full": 90.0}))
    command(BenchOptions(config=yaml), {"train": step})
    said = capsys.readouterr().out
    assert f"recommended: --batch_size 8 {micro}--model.checkpointing attention --model.attention auto" in said
    for way, rows in (("none", "2 x 64 x 8"), ("attention", "8 x 64 x 2"), ("full", "16 x 64 x 1")):
        assert re.search(rf"^  {way} +{rows} ", said, re.MULTILINE)


def test_rows_that_were_given_and_do_not_fit(yaml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "ON_A_CPU", {"train": {"seq_len": 64}})
    monkeypatch.setattr(bench, "trial", pretended({"none": 2}, {"none": 100.0}))
    assert cli.main(["bench", "--config", str(yaml), "--batch_size", "4"]) == 2
    assert "error: train.batch_size: 4 rows of 64 tokens do not fit the memory of CPU" in capsys.readouterr().err


def test_a_model_that_a_cpu_cannot_hold_is_refused(yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--config", str(yaml), "--model.d_model", "65536", "--model.d_ff", "16777216"]) == 2
    assert re.search(r"error: model: [\d.]+ GiB are predicted, and CPU has [\d.]+; take a smaller one, or --fit", capsys.readouterr().err)


def test_one_gpu_alone_is_measured(yaml: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What fits several that read a row together is told: longer rows."""
    monkeypatch.setattr(bench, "trial", lambda *_: pytest.fail("measured"))
    assert cli.main(["bench", "--config", str(yaml), "--train.context_parallel", "4"]) == 2
    assert "error: train.context_parallel: 4, and bench measures one GPU; leave it out, or give --fit" in capsys.readouterr().err
    longest = []
    for together in ("1", "4"):
        assert cli.main(["bench", "--config", str(yaml), "--fit", "1", "--train.context_parallel", together]) == 0
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  1 ")]
        longest.append([int(line[3].replace(",", "")) for line in lines])
    assert all(2 * one < several for one, several in zip(*longest, strict=True))


def test_several_processes_are_refused(yaml: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """They would all measure the first GPU at once."""
    monkeypatch.setattr(bench, "trial", lambda *_: pytest.fail("measured"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["bench", "--config", str(yaml)]) == 2
    assert capsys.readouterr().err.startswith("error: torchrun: 2 processes, and bench measures one GPU; start it without torchrun")


def test_what_fits_is_told_without_measuring(yaml: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "trial", lambda *_: pytest.fail("measured"))
    assert cli.main(["bench", "--config", str(yaml), "--fit", "24,80", "--seq_len", "1024"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("  24", "  80"))]
    assert [line[:2] for line in lines] == [[size, way] for size in ("24", "80") for way in bench.CHECKPOINTING]
    assert cli.main(["bench", "--config", str(yaml), "--fit", "24,large"]) == 2
    assert "error: fit" in capsys.readouterr().err
    assert cli.main(["bench", "--config", str(yaml), "--fit", "24,0"]) == 2
    assert capsys.readouterr().err == "error: fit: 0 GiB is not a memory size; give numbers above 0\n"
