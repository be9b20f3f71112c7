from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minifoundation.cli import main
from tests.evaluate.tiny import BUNDLED, ROOT, WHOLE, write_tiny_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


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


def test_an_evaluation_beside_another_one_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minifoundation.evaluate import harness

    folder = write_tiny_model(tmp_path / "model")
    line = ["eval", "--model_path", str(folder), "--data_dir", str(BUNDLED), "--limit", "2", "--tasks"]
    run, other = harness.run, list[int]()

    def meanwhile(*args: Any, **options: Any) -> Iterator[Any]:
        monkeypatch.setattr(harness, "run", run)
        other.append(main([*line, "piqa"]))
        yield from run(*args, **options)

    monkeypatch.setattr(harness, "run", meanwhile)
    assert main([*line, "arc_easy"]) == 0
    assert other == [2] and f"error: {folder}/eval: is being written by another process (pid " in capsys.readouterr().err
    assert main([*line, "arc_easy,piqa"]) == 0
    results = json.loads((folder / "eval" / "results.json").read_text())
    assert [row["label"] for row in results["rows"]] == ["arc_easy", "piqa"]


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
        (
            ["--model_path", "run", "--tasks", "piqa"],
            "--model_path: run holds no config.json; give run/final.pth, or the folder that export_hf",
        ),
        (["--model_path", "run/step_00000100", "--tasks", "piqa"], "--model_path: run/step_00000100: no such checkpoint; write one with"),
        (["--model_path", "other/final.pth", "--tasks", "piqa"], "--model_path: other/final.pth: no such checkpoint; write one with"),
        (
            ["--model_path", "young", "--tasks", "piqa"],
            "--model_path: young holds no config.json; give young/step_00000020, or the folder that",
        ),
        (["--model_path", ".", "--tasks", "other.txt"], "--tasks: other.txt is not text in UTF-8; write one task a line"),
        (["--model_path", ".", "--tasks", "empty.txt"], "--tasks: 'empty.txt' names no task; write one task a line"),
        (["--model_path", ".", "--tasks", "no/tasks.txt"], "--tasks: no/tasks.txt: no such file"),
        (["--model_path", ".", "--tasks", "piqa", "--data_dir", "nowhere"], "--data_dir: nowhere: no such folder"),
        (["--model_path", ".", "--limit", "-1"], "limit: "),
    ],
)
def test_what_cannot_be_found_is_one_line(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "final.pth").touch()
    for step in (10, 20):
        (tmp_path / "young" / f"step_{step:08d}").mkdir(parents=True)
    (tmp_path / "empty.txt").write_text("# nothing yet\n\n")
    (tmp_path / "other.txt").write_bytes("piqa".encode("utf-16"))
    assert main(["eval", *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {message}")


def test_a_broken_model_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny_model(tmp_path)
    (folder / "model.safetensors").write_bytes(b"not weights")
    assert main(["eval", "--model_path", str(folder), "--tasks", "piqa", "--data_dir", str(BUNDLED)]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: {folder}/model.safetensors: is damaged (")


def items(folder: Path, label: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "items" / f"{label}.jsonl").read_text().splitlines()]


def test_a_stopped_evaluation_goes_on_and_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from minifoundation.evaluate import harness

    line = ["eval", "--model_path", str(write_tiny_model(tmp_path / "model")), "--data_dir", str(BUNDLED), "--limit", "5"]
    line += ["--tasks", "arc_easy,piqa,hellaswag:0", "--out_dir"]
    assert main([*line, str(tmp_path / "whole")]) == 0
    run = harness.run
    ran: list[str] = []

    def stopped(*args: Any, **options: Any) -> Iterator[Any]:
        for place, outcomes in enumerate(run(*args, **options)):
            if place == 2:
                raise KeyboardInterrupt
            yield outcomes

    def watched(model: Any, manager: Any, requests: Any, **options: Any) -> Iterator[Any]:
        ran.extend(request.label for request in requests)
        return run(model, manager, requests, **options)

    monkeypatch.setattr(harness, "run", stopped)
    assert main([*line, str(tmp_path / "out")]) == 130
    assert not json.loads((tmp_path / "out" / "results.json").read_text())["complete"]
    assert "| piqa" in (tmp_path / "out" / "report.md").read_text(), "what is done can be read"
    monkeypatch.setattr(harness, "run", watched)
    capsys.readouterr()
    assert main([*line, str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: continuing with what is left there, tasks done: 2 of 3" in printed and ran == ["hellaswag:0"]
    whole, resumed = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "out"))
    assert resumed["complete"]
    for rows in (whole["rows"], resumed["rows"]):
        for row in rows:
            del row["seconds"], row["lm_eval"]
    assert whole["rows"] == resumed["rows"]
    assert (tmp_path / "whole" / "report.md").read_text() == (tmp_path / "out" / "report.md").read_text()


def test_one_task_with_two_limits_is_two_results_with_items_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minifoundation.evaluate import harness

    tasks = tmp_path / "tasks.txt"
    tasks.write_bytes(b"arc_easy limit=4\r\n\r\narc_easy limit=8\r\n")
    line = ["eval", "--model_path", str(write_tiny_model(tmp_path / "model")), "--data_dir", str(BUNDLED), "--tasks", str(tasks)]
    line += ["--out_dir", str(tmp_path / "out")]
    run = harness.run

    def stopped(*args: Any, **options: Any) -> Iterator[Any]:
        yield next(run(*args, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "run", stopped)
    assert main(line) == 130
    first = items(tmp_path / "out", "arc_easy_limit=4")
    monkeypatch.setattr(harness, "run", run)
    assert main(line) == 0
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(row["label"], row["n"]) for row in rows] == [("arc_easy limit=4", 4), ("arc_easy limit=8", 8)]
    few, more = (items(tmp_path / "out", f"arc_easy_limit={n}") for n in (4, 8))
    assert few == first and len(few) == 4, "what was done before the stop has stayed"
    assert len(more) == 8 and [item["doc_hash"] for item in more[:4]] == [item["doc_hash"] for item in few]


@pytest.mark.parametrize("ema", [False, True])
def test_a_checkpoint_scores_as_the_folder_it_is_exported_to(final: Callable[..., Path], tmp_path: Path, ema: bool) -> None:
    import torch

    from minifoundation.checkpoint import load_checkpoint, save_final
    from minifoundation.export.verify import random_state
    from minifoundation.model.transformer import Transformer

    made = load_checkpoint(final(original_seq_len=512, qk_norm=True))
    made.model = random_state(made.model)  # weights as initialised would hardly notice a wrong position
    made.ema = {name: weight.flip(0) for name, weight in made.model.items()}
    path = save_final(made, tmp_path)
    flags = ["--ema"] if ema else []
    assert main(["export_hf", "--ckpt", str(path), "--out_dir", str(tmp_path / "hf"), "--dtype", "fp32", *flags]) == 0
    line = ["eval", "--tasks", "arc_easy,hellaswag:0", "--data_dir", str(BUNDLED), "--limit", "8", "--model_path"]
    assert main([*line, str(path), *flags]) == 0
    assert main([*line, str(tmp_path / "hf")]) == 0
    checkpoint = load_checkpoint(path)
    transformer = Transformer(checkpoint.config.model)
    transformer.load_state_dict(checkpoint.ema if ema and checkpoint.ema else checkpoint.model)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for label in ("arc_easy", "hellaswag_0"):
        native, exported = items(path.parent / "eval_final", label), items(tmp_path / "hf" / "eval", label)
        assert len(native) == len(exported) == 8
        for ours, theirs in zip(native, exported, strict=True):
            assert ours["log_likelihoods"] == pytest.approx(theirs["log_likelihoods"], abs=1e-3) and ours["score"] == theirs["score"]
    (question,) = [json.loads(line) for line in (BUNDLED / "allenai/ai2_arc/ARC-Easy/test.jsonl").read_text().splitlines()[:1]]
    prompt = f"Question: {question['question']}\nAnswer:"
    for choice, found in zip(question["choices"]["text"], items(path.parent / "eval_final", "arc_easy")[0]["log_likelihoods"], strict=True):
        begin, whole = (tokenizer(text).input_ids for text in (prompt, f"{prompt} {choice}"))
        with torch.no_grad():
            table = transformer.logits(torch.tensor([whole]))[0].log_softmax(-1)
        expected = sum(float(table[place - 1, whole[place]]) for place in range(len(begin), len(whole)))
        assert found == pytest.approx(expected, abs=1e-3), "the transformer that was trained says the same"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ema"], "--ema: {path} holds no averaged weights; leave --ema out"),
        (["--device", "cuda:7"], "--device: cuda:7 does not work here"),
        (
            ["--engine", "vllm"],
            "--engine: vllm reads folders in Hugging Face form, {path} is a checkpoint; write one with export_hf --ckpt {path}",
        ),
    ],
)
def test_what_a_checkpoint_cannot_do_is_one_line(
    final: Callable[..., Path], capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    path = final()
    assert main(["eval", "--model_path", str(path), "--tasks", "piqa", "--data_dir", str(BUNDLED), *flags]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: {message.format(path=path)}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--engine: vllm is not installed; pip install vllm, or leave --engine out"),
        (
            ["--device", "cuda"],
            "--device: vllm computes on the GPU that it finds; leave it out; CUDA_VISIBLE_DEVICES chooses among several",
        ),
    ],
)
def test_what_vllm_cannot_do_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    monkeypatch.setattr("minifoundation.commands.eval.installed", lambda _: False)
    assert main(["eval", "--model_path", str(tmp_path), "--tasks", "piqa", "--engine", "vllm", *flags]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_vllm_under_torchrun_is_one_line_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    """Known before the processes meet: none waits for another."""
    for name, value in (("WORLD_SIZE", 2), ("RANK", rank), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, str(value))
    assert main(["eval", "--model_path", str(tmp_path), "--tasks", "piqa", "--engine", "vllm"]) == 2
    said = "error: --engine: vllm runs in one process, 2 were started; start it without torchrun\n"
    assert capsys.readouterr().err == ("" if rank else said)


def test_a_vllm_that_does_not_load_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm" or name == "minifoundation.evaluate.vllm"]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["eval", "--model_path", str(tmp_path), "--tasks", "piqa", "--engine", "vllm"]) == 2
    said = "error: --engine: vllm does not load (RuntimeError: operator torchvision::nms does not exist); install vllm in an environment"
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(said)


def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "final.pth").write_bytes(b"no")
    assert main(["eval", "--model_path", str(tmp_path / "final.pth"), "--tasks", "piqa", "--data_dir", str(BUNDLED)]) == 2
    assert "final.pth: not a checkpoint" in capsys.readouterr().err


def test_a_model_shorter_than_the_prompts_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny_model(tmp_path / "model", context=32)
    assert main(["eval", "--model_path", str(folder), "--tasks", "piqa", "--data_dir", str(BUNDLED), "--limit", "20"]) == 0
    row = json.loads((folder / "eval" / "results.json").read_text())["rows"][0]
    assert 0 < row["truncated"] <= row["requests"] == 40
    assert f"{row['truncated']} of 40" in capsys.readouterr().out


@pytest.mark.skipif(not WHOLE.is_dir(), reason=f"no complete benchmarks at {WHOLE}")
def test_a_mirror_made_by_hand_is_sealed_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    for name in ("baber/piqa", "allenai/ai2_arc"):
        shutil.copytree(WHOLE / name, tmp_path / name, copy_function=shutil.copyfile)
    line = ["eval-data", "check", "--data_dir", str(tmp_path), "--tasks", "arc_easy,piqa"]
    assert main(line) == 2
    assert "has no manifest.json; write one with --seal" in capsys.readouterr().err
    assert main([*line, "--seal"]) == 0
    assert main(line) == 0
    assert "arc_easy: has its data\npiqa: has its data" in capsys.readouterr().out
    assert main([*line[:-1], "winogrande"]) == 2
    assert "1 task without data; pull it with eval-data pull" in capsys.readouterr().err
    file = next((tmp_path / "baber/piqa").rglob("validation.parquet"))
    file.write_bytes(file.read_bytes() + b"x")
    assert main(line) == 2
    assert "1 file not as in manifest.json, the first baber/piqa/default/validation.parquet: changed" in capsys.readouterr().err
    folder = write_tiny_model(tmp_path / "model")
    assert main(["eval", "--model_path", str(folder), "--tasks", "piqa,arc_easy", "--limit", "2", "--data_dir", str(tmp_path)]) == 0
    rows = json.loads((folder / "eval" / "results.json").read_text())["rows"]
    assert "validation.parquet: has changed since the mirror's manifest was written" in rows[0]["not_run"] and rows[1]["n"] == 2
