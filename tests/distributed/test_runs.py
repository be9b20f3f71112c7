"""Runs of several processes are the run of one: from the command line to the files, through stops, kills and changes of number."""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from minifoundation.checkpoint import fault, load_checkpoint
from tests.distributed.processes import free_port, losses, node, of_rank, settings, started, torchrun, train, until, workers

pytestmark = pytest.mark.slow

STEP = 8 * 32
"""Tokens of a step."""
ALL = ["--train.tokens_per_step", str(STEP), "--train.ema", "0.9", "--train.loss_chunk", "24", "--train.grad_clip", "0.3", "--lr", "1e-3"]
ALL += ["--train.eps", "1e-6"]  # with less, Adam makes whole steps of gradients that are little more than rounding


def weights_close(one: Path, other: Path, tolerance: float) -> None:
    first, second = (load_checkpoint(out_dir / "final.pth") for out_dir in (one, other))
    for section in ("model", "ema"):
        values = getattr(first, section)
        assert values
        for name, value in values.items():
            torch.testing.assert_close(getattr(second, section)[name], value, atol=tolerance, rtol=0, msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The run of one process, 20 steps, and the options that it and all others have."""
    folder = tmp_path_factory.mktemp("alone")
    options = [*settings(folder), *ALL, "--tokens", str(20 * STEP)]
    train([], [*options, "--out_dir", f"{folder}/run", "--batch_size", "2"])
    return folder / "run", options


@pytest.mark.parametrize(("size", "parallel"), [(2, "ddp"), (2, "fsdp"), (4, "auto"), (4, "fsdp")])
def test_several_processes_train_the_weights_of_one(tmp_path: Path, alone: tuple[Path, list[str]], size: int, parallel: str) -> None:
    expected, options = alone
    sharing = ["--train.parallel", parallel, "--out_dir", f"{tmp_path}/run", "--batch_size", "1" if size == 4 else "2"]
    printed = train(torchrun(size), [*options, *sharing])
    assert f"parallel {'ddp' if parallel == 'auto' else parallel}, {size} processes" in printed
    assert f"network  {size} processes on 1 machine: " in printed
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "run")), torch.tensor(losses(expected)), atol=1e-5, rtol=1e-5)
    weights_close(expected, tmp_path / "run", 2e-6)
    one, many = (load_checkpoint(out_dir / "final.pth") for out_dir in (expected, tmp_path / "run"))
    assert one.ledger == many.ledger, "the same samples were read"
    assert one.progress["held_out_bits_per_byte"] == pytest.approx(many.progress["held_out_bits_per_byte"], abs=1e-5)


@pytest.mark.parametrize(("parallel", "module"), [("ddp", "src.cli"), ("ddp", "tests.distributed.divided"), ("fsdp", "src.cli")])
def test_two_go_on_as_one_and_again_as_two(tmp_path: Path, alone: tuple[Path, list[str]], parallel: str, module: str) -> None:
    expected, options = alone
    run = tmp_path / "run"
    here = [*options, "--out_dir", str(run), "--batch_size", "2", "--train.save_every", "6", "--resume", "auto"]
    for launcher, steps in ((torchrun(2), 6), ([], 12)):
        process = started(launcher, [*here, *(["--train.parallel", parallel] if launcher else [])], module=module)
        until(lambda steps=steps: (run / f"step_{steps:08d}" / "manifest.json").exists(), process)  # type: ignore[misc]
        process.kill() if not launcher else os.kill(of_rank(process.pid, 1), signal.SIGKILL)
        process.communicate(timeout=120)
        assert fault(run / f"step_{steps:08d}") is None
    printed = train(torchrun(2), [*here, "--train.parallel", parallel], module=module)
    assert "continuing from" in printed and ("the optimizer in 2 parts" in printed) == (module != "src.cli")
    torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(losses(expected)), atol=1e-5, rtol=1e-5)
    weights_close(expected, run, 2e-6)
    assert load_checkpoint(run / "final.pth").ledger == load_checkpoint(expected / "final.pth").ledger


def held_out(out_dir: Path) -> list[float]:
    with (out_dir / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [float(row["held_out_bits_per_byte"]) for row in csv.DictReader(file) if row["held_out_bits_per_byte"]]


@pytest.mark.parametrize(("size", "parallel"), [(2, "ddp"), (4, "fsdp")])
def test_processes_that_read_rows_together_train_the_weights_of_one(
    tmp_path: Path, alone: tuple[Path, list[str]], size: int, parallel: str
) -> None:
    """Killed on the way, and gone on with by one process that reads whole rows, and by several again."""
    expected, options = alone
    run = tmp_path / "run"
    here = [*options, "--out_dir", str(run), "--batch_size", "2", "--train.save_every", "6", "--resume", "auto"]
    together = [*here, "--train.context_parallel", "2", "--train.parallel", parallel, "--model.checkpointing", "attention"]
    for launcher, line, steps in ((torchrun(size), together, 6), ([], here, 12)):
        process = started(launcher, line)
        until(lambda steps=steps: (run / f"step_{steps:08d}" / "manifest.json").exists(), process)  # type: ignore[misc]
        process.kill() if not launcher else os.kill(of_rank(process.pid, 1), signal.SIGKILL)
        process.communicate(timeout=120)
    printed = train(torchrun(size), together)
    assert "2 read a row together, 16 tokens each" in printed and "continuing from" in printed
    torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(losses(expected)), atol=1e-5, rtol=1e-5)
    assert len(held_out(run)) == 4 and held_out(run) == pytest.approx(held_out(expected), abs=1e-5)
    weights_close(expected, run, 1e-5)  # attention adds up in another order, and the first steps of Adam enlarge that
    assert load_checkpoint(run / "final.pth").ledger == load_checkpoint(expected / "final.pth").ledger


def test_two_processes_stop_at_the_same_step_and_one_goes_on(tmp_path: Path) -> None:
    common = [*settings(tmp_path), "--tokens", "38400", "--out_dir", f"{tmp_path}/run"]
    process = started(torchrun(2), [*common, "--batch_size", "2"])
    metrics = tmp_path / "run" / "metrics.csv"
    until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 12, process)
    process.terminate()
    printed, _ = process.communicate(timeout=120)
    assert printed.count("continue with: torchrun --nproc_per_node 2 -m src.cli pretrain --") == 1
    assert len(list((tmp_path / "run").glob("step_*"))) == 1
    assert "continuing from" in train([], [*common, "--batch_size", "4", "--resume", "auto"])
    assert load_checkpoint(tmp_path / "run" / "final.pth").progress["step"] == 300


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_killed_process_is_started_again_and_the_run_is_the_same_bit_for_bit(tmp_path: Path, parallel: str) -> None:
    options = [*settings(tmp_path), *ALL, "--tokens", str(40 * STEP), "--batch_size", "2", "--train.save_every", "4", "--resume", "auto"]
    options += ["--train.parallel", parallel]
    train(torchrun(2), [*options, "--out_dir", f"{tmp_path}/whole"])
    run = tmp_path / "killed"
    process = started(torchrun(2, "--max_restarts", "1"), [*options, "--out_dir", str(run)])
    until(lambda: (run / "step_00000008" / "manifest.json").exists(), process)
    os.kill(of_rank(process.pid, 1), signal.SIGKILL)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed[-3000:]
    assert len(json.loads((run / "run.json").read_text())["starts"]) == 2
    assert losses(run) == losses(tmp_path / "whole")
    weights_close(tmp_path / "whole", run, 0.0)


REPLACED = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""Without it torchrun does not find together again when a node was replaced."""


def test_two_nodes_train_one_is_lost_and_comes_back(tmp_path: Path, alone: tuple[Path, list[str]]) -> None:
    expected, options = alone
    run, port = tmp_path / "run", free_port()
    here = [*options, "--out_dir", str(run), "--batch_size", "1", "--train.save_every", "4", "--resume", "auto", "--train.parallel", "hsdp"]
    first, second = (started(node(port, number, "--max_restarts", "3"), here, **REPLACED) for number in (0, 1))
    until(lambda: (run / "step_00000004" / "manifest.json").exists(), first)
    lost = workers(second.pid)
    assert len(lost) == 2
    for pid in (second.pid, *lost.values()):  # torchrun first: a node that is lost does not start anything again
        os.kill(pid, signal.SIGKILL)
    second.communicate(timeout=60)
    again = started(node(port, 1, "--max_restarts", "3"), here, **REPLACED)
    printed, _ = first.communicate(timeout=280)
    assert first.returncode == 0, printed[-3000:]
    other, _ = again.communicate(timeout=60)
    assert again.returncode == 0
    printed += other  # torchrun says which node is the first
    assert "2 machines" in printed and "parallel hsdp, 4 processes: the model in 2 parts" in printed
    torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(losses(expected)), atol=1e-5, rtol=1e-5)
    weights_close(expected, run, 2e-6)


def test_machines_of_three_and_of_one_train_the_weights_of_one(tmp_path: Path, alone: tuple[Path, list[str]]) -> None:
    expected, options = alone
    here = [*options, "--out_dir", f"{tmp_path}/run", "--batch_size", "2"]
    port = free_port()
    both = [started(node(port, number, size=size), here) for number, size in enumerate((3, 1))]
    printed = "".join(one.communicate(timeout=280)[0] for one in both)
    assert [one.returncode for one in both] == [0, 0], printed[-3000:]
    assert "network  4 processes on 2 machines: " in printed  # whichever of them torchrun says is the first
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "run")), torch.tensor(losses(expected)), atol=1e-5, rtol=1e-5)
    weights_close(expected, tmp_path / "run", 2e-6)


def test_a_silent_process_is_named(tmp_path: Path) -> None:
    options = [*settings(tmp_path), *ALL, "--tokens", str(100_000 * STEP), "--batch_size", "2", "--train.rank_timeout", "4"]
    process = started(torchrun(2), [*options, "--out_dir", f"{tmp_path}/run"])
    until(lambda: (tmp_path / "run" / "metrics.csv").exists() and len(losses(tmp_path / "run")) > 5, process)
    stopped = of_rank(process.pid, 1)
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    assert process.stdout is not None
    line = next(line for line in process.stdout if line.startswith("error: rank"))
    assert time.monotonic() - began < 30
    assert line.startswith(f"error: rank 1 on {socket.gethostname()} is silent; the others have waited for ")
    os.kill(stopped, signal.SIGCONT)
    process.communicate(timeout=120)
    assert process.returncode != 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ["--train.tokens_per_step", "320", "--batch_size", "2"],
            "train.tokens_per_step: 320 is not a multiple of 128 (batch_size 2 x seq_len 32",
        ),
        (["--batch_size", "4096", "--tokens", "1_000_000"], "samples of 32 tokens, and one step takes 8,192"),
        (["--train.parallel", "none"], "train.parallel: none, and there are 2 processes"),
        (["--train.parallel", "fsdp", "--train.optimizer_states", "int8"], "train.parallel: fsdp cannot split moments in int8"),
        (["--train.parallel", "hsdp"], "train.parallel: hsdp with 1 nodes of 2 processes"),
        (["--train.context_parallel", "4"], "train.context_parallel: 4, and there are 2 processes; start a multiple of it"),
        (["--train.context_parallel", "2", "--model.attention", "cudnn"], "model.attention cudnn cannot read a row in chunks"),
        (
            ["--train.context_parallel", "2", "--seq_len", "30"],
            "train.seq_len 30 is not a multiple of 4, as train.context_parallel 2 needs",
        ),
        (["--lr", "nonsense"], "train.lr"),
        (["--resume", "/nowhere"], "/nowhere: no such checkpoint"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_on_all(tmp_path: Path, change: list[str], message: str) -> None:
    process = started(torchrun(2), [*settings(tmp_path), "--tokens", "5120", "--out_dir", f"{tmp_path}/run", *change])
    printed, _ = process.communicate(timeout=120)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], printed
    left = printed.count("exitcode  : 2 ")
    before = "--lr" in change or {"cudnn", "30"} & set(change)
    # A mistake that is seen before the processes meet is one of each by itself, and torchrun may end the slower one.
    ended = "exitcode  : -15" in printed or "exitcode  : 130" in printed  # before Python listens to signals, or after
    assert left == 2 or (left == 1 and before and ended), printed
    assert not (tmp_path / "run" / "metrics.csv").exists()


FAILING = "tests.distributed.failing"


def test_a_checkpoint_that_cannot_be_written_beside_the_training_ends_all_in_one_line(tmp_path: Path) -> None:
    options = [*settings(tmp_path), *ALL, "--tokens", str(100_000 * STEP), "--batch_size", "2", "--train.save_every", "3"]
    process = started(torchrun(2), [*options, "--out_dir", f"{tmp_path}/run"], module=FAILING, FAILS="disk")
    printed, _ = process.communicate(timeout=120)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0].startswith("error: the disk: the disk is full; "), printed
    assert printed.count("exitcode  : 2 ") == 2 and "RuntimeError" not in printed
    assert [folder.name for folder in (tmp_path / "run").glob("step_*")] == ["step_00000003"]


def test_processes_that_run_out_of_memory_together_say_it_once(tmp_path: Path) -> None:
    options = [*settings(tmp_path), *ALL, "--tokens", str(100 * STEP), "--batch_size", "2"]
    process = started(torchrun(2), [*options, "--out_dir", f"{tmp_path}/run"], module=FAILING, FAILS="memory")
    printed, _ = process.communicate(timeout=120)
    assert printed.count("error: train.batch_size: 2 rows of 32 tokens do not fit") == 1, printed
    assert process.returncode != 0 and "Traceback" not in printed.split("failed (exitcode")[0]


def test_processes_with_other_settings_are_told_by_the_first(tmp_path: Path) -> None:
    port = free_port()
    common = [*settings(tmp_path), "--tokens", "5120", "--out_dir", f"{tmp_path}/run"]
    first, second = (started(node(port, number), [*common, "--train.beta1", f"0.{9 - number}"]) for number in (0, 1))
    (told, _), (silent, _) = first.communicate(timeout=120), second.communicate(timeout=120)
    told, silent = sorted((told, silent), key=lambda printed: "error: " not in printed)  # torchrun says which node is the first
    host = socket.gethostname()
    lines = [line for line in told.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "error: train.beta1: " in lines[0] and f"on rank 2 ({host}), and " in lines[0], told
    assert not [line for line in silent.splitlines() if line.startswith("error: ")]


IMPATIENT = "tests.distributed.impatient"


def test_a_first_node_that_is_not_there(tmp_path: Path) -> None:
    """Without torchrun, as under srun: the second of two nodes, and nobody at the address."""
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = started([], [*settings(tmp_path), "--tokens", "5120"], module=IMPATIENT, **variables)
    printed, _ = process.communicate(timeout=250)
    assert process.returncode == 2
    assert printed.splitlines()[-1].startswith(
        f"error: MASTER_ADDR, MASTER_PORT: 127.0.0.1:{variables['MASTER_PORT']} was not reached within 10 s"
    )


def test_processes_that_do_not_come_are_named(tmp_path: Path) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = started([], [*settings(tmp_path), "--tokens", "5120"], module=IMPATIENT, **variables)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 2
    assert printed.splitlines()[-1] == "error: torchrun: of 2 processes rank 1 did not start within 10 s; see what its node says"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_go_back_as_one_does(tmp_path: Path, parallel: str) -> None:
    """At a rate that learns nothing every second step is above the median; two in a row are gone back over, and then it is the end."""
    bad = "--lr 1e-6 --train.spike_z 0.05 --train.spike_window 16 --train.max_skips 2 --train.max_rollbacks 1 --train.save_every 2"
    options = [*settings(tmp_path), *ALL, "--tokens", str(100 * STEP), "--batch_size", "2", *bad.split()]
    told = []
    for launcher, name in (([], "one"), (torchrun(2), "two")):
        sharing = ["--train.parallel", parallel] if launcher else []
        process = started(launcher, [*options, *sharing, "--out_dir", f"{tmp_path}/{name}"])
        printed, _ = process.communicate(timeout=200)
        lines = [line.replace(f"/{name}/", "/run/") for line in printed.splitlines() if line.startswith(("going back to", "error: "))]
        assert [line.split(":")[0] for line in lines] == [lines[0].split(":")[0], "error"] and "train.max_rollbacks" in lines[1], printed
        told.append((lines, json.loads((tmp_path / name / "rollbacks.json").read_text())))
    assert told[0] == told[1]
