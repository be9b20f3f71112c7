"""``doctor`` on a machine and on run folders that are whole, damaged in every part, or no run at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minifoundation import cli, config, runtime
from minifoundation.commands import doctor
from minifoundation.config import RunConfig
from minifoundation.data import hub
from minifoundation.lock import held
from minifoundation.model.kernels import gated
from minifoundation.train.run import run
from tests.pretended import Pretended
from tests.train.conftest import EXAMPLE, TINY

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run and its shards."""
    folder = tmp_path_factory.mktemp("doctor")
    (folder / "verse.txt").write_bytes(EXAMPLE.read_bytes()[:60_000])
    here = {"out_dir": str(folder / "run"), "data": {"source": str(folder / "verse.txt"), "shards_dir": str(folder / "shards")}}
    assert run(config.build(RunConfig, config.merged(TINY, here), "test"), resume=None, dry_run=False)
    return folder


def told(capsys: Capture, *arguments: str, code: int = 0) -> str:
    assert cli.main(["doctor", "--no_network", *arguments]) == code
    out, err = capsys.readouterr()
    return out + err


def test_the_machine(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = told(capsys)
    assert "ok     fp32 computes" in shown and "ok     bf16 computes" in shown and "lm-eval" in shown and "wrong" not in shown
    assert "Hugging Face" not in shown
    monkeypatch.setattr(hub, "unreachable", lambda: "https://huggingface.co does not answer (no route to host)")
    assert cli.main(["doctor"]) == 0
    assert "note   https://huggingface.co does not answer (no route to host): give --data a path" in capsys.readouterr().out


def test_a_gpu_whose_quack_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hopper(Pretended):
        @property
        def capability(self) -> tuple[int, int]:
            return 9, 0

    def said() -> list[str]:
        return [f"{kind} {text}" for kind, text in doctor._tried(Hopper(torch.device("cpu"), "H100", 2**36, None))]

    monkeypatch.setattr(runtime, "compute_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(gated, "INSTALLED", False)
    assert not any("SwiGLU" in line for line in said()), "a package that is not there is no fault"
    monkeypatch.setattr(gated, "INSTALLED", True)
    monkeypatch.setattr(gated, "fault", lambda *_: None)
    assert "ok SwiGLU: in QuACK's products" in said()
    monkeypatch.setattr(gated, "fault", lambda *_: "fails here (TypeError: of a version)")
    assert "note SwiGLU is slower than it could be: QuACK fails here (TypeError: of a version)" in said()


def test_a_whole_run(trained: Path, capsys: Capture) -> None:
    shown = told(capsys, "--run", str(trained / "run"))
    assert "wrong" not in shown
    for line in (
        "config.yaml: valid",
        "run.json: 1 start, the last",
        "step_00000008: whole",
        "final.pth: whole",
        "metrics.csv: 12 rows in order",
    ):
        assert line in shown
    assert "token shards " in shown and "whole (every byte compared)" in shown


def changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def doubled(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[-1]]))


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("run/step_00000004/tensors.safetensors", changed, "wrong  step_00000004: tensors.safetensors does not match its sha256"),
        ("run/step_00000004/manifest.json", Path.unlink, "wrong  step_00000004: manifest.json is missing or damaged"),
        ("run/final.pth", changed, "wrong  final.pth: final.pth does not match its sha256"),
        ("run/metrics.csv", doubled, "wrong  metrics.csv: step 12 comes twice or out of order"),
        ("run/metrics.csv", lambda path: path.write_bytes(b"\xff\xfe"), "wrong  metrics.csv: is no table of metrics; restore it"),
        ("run/metrics.csv", lambda path: path.write_bytes(path.read_bytes() + b"1\xff"), "wrong  metrics.csv: a row is damaged"),
        ("run/config.yaml", lambda path: path.write_text("model: {d_modl: 3}"), "wrong  config.yaml: "),
        ("run/rollbacks.json", lambda path: path.write_text("{"), "rollbacks.json: is damaged"),
        ("run/run.json", lambda path: path.write_text("{"), "note   run.json: missing or damaged"),
        ("run/step_00000099.part", Path.mkdir, "note   step_00000099.part: not used by the run; it can be removed"),
    ],
)
def test_what_is_wrong_is_named(
    trained: Path, tmp_path: Path, capsys: Capture, name: str, harm: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    harm(tmp_path / name)
    shown = told(capsys, "--run", str(tmp_path / "run"), code=2 if "note" not in message else 0)
    assert message in shown
    assert "Traceback" not in shown and ("error: doctor: 1 thing is wrong" in shown) == ("note" not in message)


def test_damaged_shards_are_found(trained: Path, capsys: Capture) -> None:
    shard = next((trained / "shards").rglob("train-*.bin"))
    whole = shard.read_bytes()
    changed(shard)
    try:
        assert "wrong  token shards: " in told(capsys, "--run", str(trained / "run"), code=2)
    finally:
        shard.write_bytes(whole)


def test_a_run_that_goes_on_is_told(trained: Path, capsys: Capture) -> None:
    with held(trained / "run"):
        assert "note   a run is going on (pid " in told(capsys, "--run", str(trained / "run"))


def test_what_is_no_run(tmp_path: Path, capsys: Capture) -> None:
    assert "wrong  no such folder" in told(capsys, "--run", str(tmp_path / "none"), code=2)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "final.pth").touch()
    assert f"wrong  a file: give the folder, {tmp_path / 'run'}" in told(capsys, "--run", str(tmp_path / "run" / "final.pth"), code=2)
    assert "no checkpoint yet" in told(capsys, "--run", str(tmp_path), code=2)
