"""The settings of ``pretrain`` from what is typed, over those of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minifoundation import cli
from minifoundation.commands.pretrain import layered
from minifoundation.config import PretrainOptions


@pytest.mark.parametrize(
    ("in_file", "switches", "precision"),
    [
        ("bf16", {}, "bf16"),
        ("bf16", {"bf16": False}, "fp32"),
        ("bf16", {"amp": False}, "fp32"),
        ("fp16", {"amp": False}, "fp32"),
        ("fp16", {"bf16": False}, "fp16"),
        ("fp8", {"bf16": False}, "fp8"),
        ("fp32", {"amp": True, "bf16": False}, "fp16"),
    ],
)
def test_a_switch_that_is_given_as_no_turns_half_precision_off(
    tmp_path: Path, in_file: str, switches: dict[str, Any], precision: str
) -> None:
    (tmp_path / "run.yaml").write_text(f"train: {{precision: {in_file}}}\n")
    options = PretrainOptions(config=tmp_path / "run.yaml", **switches)
    assert layered(options, {}, below={})["train"]["precision"] == precision
    assert layered(options, {"train": {"lr": 1.0}}, below={})["train"] == {"precision": precision, "lr": 1.0}


def test_an_empty_checkpoint_to_resume_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "--config", "configs/demo.yaml", "--data", "x", "--resume", ""]) == 2
    assert capsys.readouterr().err == "error: resume: is empty; give a path, or leave it out\n"
