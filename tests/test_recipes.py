"""The recipes: their files are read, their shell is run against stand-ins, and torchrun and the command accept what comes out."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from minifoundation import cli, config
from tests.conftest import Calls

RECIPES = config.REPOSITORY / "recipes"

STAND_INS = {
    "srun": 'shift; exec "$@"',  # its own option goes
    "scontrol": "echo first.node; echo second.node",
    "ssh": 'shift 2; exec bash -c "$1"',
    "torchrun": 'printf "%s\\n" "$(printf "%q " "$@")"',
}
VARIABLES = {
    "SLURM_NNODES": "2",
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "SKYPILOT_TASK_ID": "sky-17",
}


def shell(name: str) -> str:
    """Return the shell of a recipe."""
    text = (RECIPES / name).read_text(encoding="utf-8")
    if not name.endswith(".yaml"):
        return text
    read = yaml.safe_load(text)
    if "run" in read:
        return str(read["run"])
    (container,) = read["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    assert container["command"] == ["/bin/bash", "-c"]
    return str(container["args"][0])


def lines(name: str, folder: Path, *arguments: str) -> list[list[str]]:
    """Return what torchrun is given, each time it is, when the shell of a recipe runs."""
    there = folder / ".venv" / "bin"
    there.mkdir(parents=True)
    for program, body in STAND_INS.items():
        path = there / program
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    environment = {**os.environ, **VARIABLES, "PATH": f"{there}:{os.environ['PATH']}"}
    command = ["bash", "-c", shell(name), name, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if "src.cli" in line]


@pytest.mark.parametrize(
    ("name", "arguments", "nodes", "first"),
    [
        ("slurm.sbatch", [], 2, "first.node:29500"),
        ("ssh.sh", ["first.node", "second.node", "third.node"], 3, "first.node:29500"),
        ("skypilot.yaml", [], 2, "10.0.0.1:29500"),
        ("kubernetes.yaml", [], 2, ""),
    ],
)
def test_a_recipe_starts_a_run(
    tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch, name: str, arguments: list[str], nodes: int, first: str
) -> None:
    found = lines(name, tmp_path, *arguments)
    assert len(found) == (3 if name == "ssh.sh" else 1) and all(line == found[0] for line in found)
    read = get_args_parser().parse_args(found[0])
    if name == "kubernetes.yaml":  # the operator says it
        policy = yaml.safe_load((RECIPES / name).read_text(encoding="utf-8"))["spec"]
        read.nnodes, read.nproc_per_node = str(policy["elasticPolicy"]["maxReplicas"]), policy["nprocPerNode"]
        read.max_restarts = policy["elasticPolicy"]["maxRestarts"]
    assert (read.nnodes, read.nproc_per_node, read.rdzv_endpoint) == (str(nodes), "8", first)
    assert read.module and read.training_script == "src.cli" and read.max_restarts > 0
    monkeypatch.chdir(config.REPOSITORY)
    assert cli.main(read.training_script_args) == 0
    command, options, values = calls.pop()
    assert command == "pretrain" and options.resume == "auto"
    run = config.build(config.RunConfig, config.merged(config.read_yaml(options.config), values), name)
    assert run.train.tokens_per_step is not None and isinstance(run.train.batch_size, int)
    assert run.train.tokens_per_step % (run.train.batch_size * run.train.seq_len * 8 * nodes) == 0, "all of them share a step evenly"


def test_slurm_puts_the_job_back(tmp_path: Path) -> None:
    """At Slurm's signal torchrun is told to stop, waited for, and the job is queued again, unless the run is finished."""
    text = shell("slurm.sbatch").replace("srun --kill-on-bad-exit=1 .venv/bin/torchrun", "python3 -c 'import time; time.sleep(60)'")
    text = text.replace("step=$!", "step=$!; kill -TERM $$")
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/bash\n[ "$1" = show ] && echo node || echo "scontrol $*"\n')
    scontrol.chmod(0o755)
    environment = {**os.environ, **VARIABLES, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (0, "scontrol requeue 17\n"), done.stderr
    (tmp_path / "outputs" / "pretrain").mkdir(parents=True)
    (tmp_path / "outputs" / "pretrain" / "final.pth").touch()
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("name", ["slurm.sbatch", "ssh.sh"])
def test_scripts_are_bash(name: str) -> None:
    subprocess.run(["bash", "-n", str(RECIPES / name)], check=True)
    assert (RECIPES / name).read_text(encoding="utf-8").startswith("#!/bin/bash\n")


def test_ssh_needs_a_host() -> None:
    done = subprocess.run(["bash", str(RECIPES / "ssh.sh")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "usage: recipes/ssh.sh HOST...\n")
